"""The simulated bandit with answers of several tokens: an autoregressive policy, so that lengths and norms differ.

A network of two layers sees a context, the token before and the position, and gives five logits: four symbols and an
end. An answer has one to five tokens, and is right if it is the context's own. Pretraining puts about 0.3 on the right
answer of a target context and most of the rest on a wrong one of another length; general contexts are known. GRPO then
raises the reward on the target contexts. Losses are Dr. GRPO's, whose gradient no constant shift of the advantages
biases (docs/baseline.md). Each of the two weight matrices is a block; gradients of responses are formed explicitly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpy.typing import ArrayLike

import pcr_core as pcr
import pcr_jax
from benchmarks.learning.bandit import Params, Regime

CONTEXT, HIDDEN, SYMBOLS, LONGEST, CONTEXTS = 16, 24, 4, 5, 24
END = SYMBOLS  # also the token before the first
INPUTS = CONTEXT + SYMBOLS + 1 + LONGEST
PRETRAINING, STEPS, LAST = 250, 120, 3
EVALUATE_EVERY = 5


@dataclass(frozen=True)
class Treatment:
    """A rule and its advantages.

    Attributes:
        rule: of `pcr_core`.
        mean: what the rewards are compared with: the group's mean (GRPO), that of the others (RLOO), or the mean by
            length of the group (OPO); the last two without division by the deviation.
        weight: by what a running shift is estimated, in the place of |y_i|^2: the measured norm, the length, or the
            squared norm of the derivative with respect to the logits; None for no shift.
        share: of that shift.
    """

    rule: pcr.Rule
    mean: Literal["group", "others", "length"] = "group"
    weight: Literal["norm", "length", "logits"] | None = None
    share: float = 1.0

    def advantages(self, rewards: Array, ids: Array, length: Array, shift: Array) -> Array:
        """(responses,)"""
        if self.mean == "group":
            return pcr.group_advantages(rewards, ids) - shift
        same = (ids[:, None] == ids[None, :]).astype(rewards.dtype)
        if self.mean == "others":
            size = jnp.sum(same, axis=1)
            return pcr.group_advantages(rewards, ids, scale="none") * size / (size - 1)
        return rewards - (same @ (rewards * length)) / (same @ length)


@dataclass(frozen=True)
class Lengths(Regime):
    """Where right and wrong answers have lengths of their own; a plain `Regime` draws all five alike.

    Attributes:
        right, wrong: weights of answers of 0 to 4 symbols, to which the end is added. General contexts' answers are
            drawn like right ones.
    """

    right: tuple[float, ...] = (1.0,) * LONGEST
    wrong: tuple[float, ...] = (1.0,) * LONGEST

    def draw(self, key: Array) -> tuple[Array, Array]:
        """Numbers of symbols: (2, 24) of the right answers of both kinds, and (24,) of the wrong ones."""
        keys = jax.random.split(key)
        right, wrong = (jnp.log(jnp.asarray(weights)) for weights in (self.right, self.wrong))
        return (
            jax.random.categorical(keys[0], right, shape=(2, CONTEXTS)),
            jax.random.categorical(keys[1], wrong, shape=(CONTEXTS,)),
        )


class Instance(NamedTuple):
    """Contexts (24, d) and right answers (24, LONGEST) of both kinds, and the policy to start from."""

    target: Array
    target_answer: Array
    general: Array
    general_answer: Array
    start: Params
    key: Array


class Outcome(NamedTuple):
    """Of every run, shapes (methods, cells, instances). Accuracy is the probability of the right answer.

    Attributes:
        target, general: accuracy at the end (mean over the last three evaluations).
        drawdown: how far accuracy on the general contexts fell below its start at its lowest.
        shift: mean over steps of the shift.
        taken: mean share of sum A_i^2 |y_i|^2, A before the shift, that was taken away by it.
        length: mean length of the responses, in tokens.
    """

    target: Any
    general: Any
    drawdown: Any
    shift: Any
    taken: Any
    length: Any


def simulate(regime: Regime, methods: Sequence[Treatment], cells: ArrayLike, seeds: Sequence[int]) -> Outcome:
    """As `bandit.simulate`; of the regime prompts, group and optimizer count, and flips."""
    instances = jax.jit(jax.vmap(partial(_instance, regime)))(jnp.asarray(seeds))
    out = [
        _run(regime, method, instances, jnp.asarray(pairs, jnp.float32))
        for method, pairs in zip(methods, np.asarray(cells))
    ]
    return Outcome(*(np.moveaxis(np.stack([np.asarray(x) for x in column]), 1, -1) for column in zip(*out)))


@partial(jax.jit, static_argnums=(0, 1))
def _run(regime: Regime, method: Treatment, instances: Instance, cells: Array) -> Outcome:
    """(instances, cells)"""
    train = jax.vmap(partial(_train, regime, method), in_axes=(None, 0))
    out: Outcome = jax.lax.map(lambda instance: train(instance, cells), instances, batch_size=4)
    return out


def answers(key: Array, count: Array) -> Array:
    """(n, LONGEST) tokens: `count` (n,) symbols, then ends."""
    symbols = jax.random.randint(key, (count.size, LONGEST), 0, SYMBOLS)
    return jnp.where(jnp.arange(LONGEST) < count[:, None], symbols, END)


def mask_of(tokens: Array) -> Array:
    """(..., LONGEST) the tokens up to the first end and with it."""
    return jnp.cumsum(tokens == END, axis=-1) - (tokens == END) == 0


def inputs_of(contexts: Array, tokens: Array) -> Array:
    """(n, LONGEST, INPUTS) what the network sees before each token."""
    before = jnp.concatenate([jnp.full_like(tokens[:, :1], END), tokens[:, :-1]], axis=1)
    parts = (
        jnp.repeat(contexts[:, None], LONGEST, axis=1),
        jax.nn.one_hot(before, SYMBOLS + 1),
        jnp.broadcast_to(jnp.eye(LONGEST), (tokens.shape[0], LONGEST, LONGEST)),
    )
    return jnp.concatenate(parts, axis=-1)


def log_policy(params: Params, inputs: Array) -> tuple[Array, Array]:
    """Hidden units, and log-probabilities of all tokens."""
    hidden = jnp.tanh(inputs @ params.first)
    return hidden, jax.nn.log_softmax(hidden @ params.second)


def token_logp(params: Params, contexts: Array, tokens: Array) -> Array:
    """(n, LONGEST), 0 after the answer's end."""
    _, every = log_policy(params, inputs_of(contexts, tokens))
    return jnp.take_along_axis(every, tokens[..., None], axis=-1)[..., 0] * mask_of(tokens)


def respond(params: Params, contexts: Array, uniform: Array) -> Array:
    """(n, LONGEST) tokens sampled by uniform numbers of that shape."""

    def one(tokens: Array, t: Array) -> tuple[Array, None]:
        _, every = log_policy(params, inputs_of(contexts, tokens))
        cumulative = jnp.cumsum(jnp.exp(every[:, t]), axis=1)
        drawn = jnp.sum(uniform[:, t, None] >= cumulative[:, :-1], axis=1)
        return tokens.at[:, t].set(drawn), None

    start = jnp.full(uniform.shape, END)
    tokens, _ = jax.lax.scan(one, start, jnp.arange(LONGEST))
    return jnp.where(mask_of(tokens), tokens, END)


def contributions(params: Params, contexts: Array, tokens: Array, cotangent: Array) -> Params:
    """Gradient of each response's sum of cotangent (n, LONGEST) times log-probability: (n, ...) for each weight."""
    inputs = inputs_of(contexts, tokens)
    hidden, every = log_policy(params, inputs)
    of_logits = cotangent[..., None] * (jax.nn.one_hot(tokens, SYMBOLS + 1) - jnp.exp(every))
    back = (of_logits @ params.second.T) * (1 - hidden**2)
    return Params(jnp.einsum("nti,nth->nih", inputs, back), jnp.einsum("nth,ntk->nhk", hidden, of_logits))


def logit_norms(params: Params, contexts: Array, tokens: Array) -> Array:
    """(n,) squared norm of the derivative of a response's log-probability with respect to all its logits."""
    _, every = log_policy(params, inputs_of(contexts, tokens))
    error = (jax.nn.one_hot(tokens, SYMBOLS + 1) - jnp.exp(every)) * mask_of(tokens)[..., None]
    return jnp.sum(error**2, axis=(1, 2))


def _instance(regime: Regime, seed: Array) -> Instance:
    keys = jax.random.split(jax.random.key(seed), 8)
    contexts = jax.random.normal(keys[0], (2, CONTEXTS, CONTEXT)) * (4 / CONTEXT) ** 0.5
    if isinstance(regime, Lengths):
        count, other = regime.draw(keys[1])
    else:
        count = jax.random.randint(keys[1], (2, CONTEXTS), 0, LONGEST)
        other = (count[0] + jax.random.randint(keys[4], (CONTEXTS,), 1, LONGEST)) % LONGEST
    right = jnp.stack([answers(k, c) for k, c in zip(keys[2:4], count)])
    wrong = answers(keys[5], other)
    same = jnp.all(wrong == right[0], axis=1)  # by chance, of one length: its first token then is another
    wrong = wrong.at[:, 0].set(jnp.where(same, (wrong[:, 0] + 1) % SYMBOLS, wrong[:, 0]))
    start = Params(
        jax.random.normal(keys[6], (INPUTS, HIDDEN)) * INPUTS**-0.5,
        jax.random.normal(keys[7], (HIDDEN, SYMBOLS + 1)) * (0.25 / HIDDEN) ** 0.5,
    )
    seen = jnp.concatenate([contexts[0], contexts[0], contexts[1]])
    tokens = jnp.concatenate([right[0], wrong, right[1]])
    weight = jnp.repeat(jnp.asarray([0.35, 0.65, 1.0]), CONTEXTS)
    optimizer = optax.adam(0.02)

    def loss(params: Params) -> Array:
        mask = mask_of(tokens)
        _, every = log_policy(params, inputs_of(seen, tokens))
        smooth = 0.95 * token_logp(params, seen, tokens) + 0.05 * jnp.mean(every, axis=-1) * mask
        return -jnp.sum(weight[:, None] * smooth) / CONTEXTS

    def step(carry: tuple[Params, Any], _: None) -> tuple[tuple[Params, Any], None]:
        params, state = carry
        update, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, update), state), None

    (start, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, PRETRAINING)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return Instance(contexts[0], right[0], contexts[1], right[1], start, key)


def _accuracies(instance: Instance, params: Params) -> tuple[Array, Array]:
    def accuracy(contexts: Array, tokens: Array) -> Array:
        right = jnp.mean(jnp.exp(jnp.sum(token_logp(params, contexts, tokens), axis=1)))
        return jnp.where(jnp.isfinite(right), right, 0.0)

    return (
        accuracy(instance.target, instance.target_answer),
        accuracy(instance.general, instance.general_answer),
    )


def _train(regime: Regime, method: Treatment, instance: Instance, cell: Array) -> Outcome:
    learning_rate, beta = cell
    n = regime.prompts * regime.group
    ids = jnp.arange(n) // regime.group
    adam = optax.scale_by_adam(0.9, 0.99)
    blocks = pcr_jax.select_blocks(instance.start, "all")

    def step(carry: Any, index: Array) -> Any:
        params, optimizer, sums = carry
        keys = jax.random.split(jax.random.fold_in(instance.key, index), 3)
        which = jax.random.permutation(keys[0], CONTEXTS)[: regime.prompts][ids]
        contexts = instance.target[which]
        tokens = respond(params, contexts, jax.random.uniform(keys[1], (n, LONGEST)))
        mask = mask_of(tokens)
        length = jnp.sum(mask, axis=1).astype(jnp.float32)
        right = jnp.all(tokens == instance.target_answer[which], axis=1)
        rewards = (right ^ (jax.random.uniform(keys[2], (n,)) < regime.flips)).astype(jnp.float32)

        shift = jnp.zeros(()) if method.weight is None else method.share * pcr.estimate_baseline(sums).shift
        applied = method.advantages(rewards, ids, length, shift)
        logp = token_logp(params, contexts, tokens)
        reference = token_logp(instance.start, contexts, tokens)
        objective = pcr.grpo_objective(logp, logp, reference, applied, mask, beta=beta, normalization="dr_grpo")
        plasticity, stability = (
            contributions(params, contexts, tokens, c)
            for c in (objective.plasticity_cotangent, objective.stability_cotangent)
        )
        dense = [jnp.concatenate([x.reshape(n, -1) for x in each], axis=1) for each in (plasticity, stability)]
        sizes = [instance.start.first.size, instance.start.second.size]
        statistics = pcr.contribution_statistics(*dense, group_ids=ids, sizes=sizes)
        response_sq = jnp.sum(dense[0] ** 2, axis=1)
        zero = applied == 0
        y_sq = jnp.where(zero, 0.0, response_sq / jnp.where(zero, 1.0, applied) ** 2)
        if method.weight is not None:
            proxy = {"norm": y_sq, "length": length, "logits": logit_norms(params, contexts, tokens)}[method.weight]
            new = pcr.baseline_sums(applied**2 * proxy, applied, group_ids=ids, shift=shift)
            sums = pcr.update_baseline_sums(sums, new)
        totals = [jax.tree.map(lambda x: jnp.sum(x, axis=0), each) for each in (plasticity, stability)]
        update, _ = pcr_jax.resolve(*totals, statistics, method.rule, blocks=blocks)
        direction, optimizer = adam.update(update, optimizer)
        params = Params(*(p - learning_rate * u for p, u in zip(params, direction)))
        energy = jnp.sum((applied + shift) ** 2 * y_sq)
        taken = jnp.where(energy > 0, 1 - jnp.sum(response_sq) / jnp.where(energy > 0, energy, 1.0), 0.0)
        return (params, optimizer, sums), (shift, taken, jnp.mean(length))

    def stretch(carry: Any, start: Array) -> Any:
        carry, seen = jax.lax.scan(step, carry, start + jnp.arange(EVALUATE_EVERY))
        return carry, (_accuracies(instance, carry[0]), seen)

    start = (instance.start, adam.init(instance.start), pcr.BaselineSums(*jnp.zeros(6)))
    _, ((target, general), seen) = jax.lax.scan(stretch, start, jnp.arange(0, STEPS, EVALUATE_EVERY))
    begun = _accuracies(instance, instance.start)[1]
    return Outcome(
        jnp.mean(target[-LAST:]),
        jnp.mean(general[-LAST:]),
        begun - jnp.minimum(jnp.min(general), begun),
        *(jnp.mean(x) for x in seen),
    )
