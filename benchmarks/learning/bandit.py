"""A contextual bandit small enough to train thousands of times: GRPO with any rule, vectorised over instances.

A network of two layers, d = 24 -> 32 (tanh) -> K = 10 actions, is pretrained on 32 target and 32 general contexts with
random labels; on the target contexts it puts about 0.3 on the right action. GRPO then raises the reward on the target
contexts, with a KL to the pretrained policy measured on the same responses; what it forgets shows on the general ones.
Each of the two weight matrices is a block. A response is one action, so that its gradients have closed forms;
advantages, losses, cotangents, scatter and rules are those of `pcr_core`, the update is `pcr_jax.resolve`'s.

Runs of one instance with different learning rates, betas and rules share all random numbers, and so can be paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpy.typing import ArrayLike

import pcr_core
import pcr_jax
from pcr_core import BlockStatistics, Rule, Weights

INPUTS, HIDDEN, ACTIONS, CONTEXTS = 24, 32, 10, 32
PRETRAINING, STEPS, EVALUATE_EVERY, LAST = 150, 150, 5, 3


class Params(NamedTuple):
    """First and second layer; the two blocks."""

    first: Array
    second: Array


@dataclass(frozen=True)
class Regime:
    """What is trained on, and how.

    Attributes:
        prompts: contexts a step, drawn from the 32 target ones.
        group: responses a prompt.
        flips: probability that a reward is the wrong way round.
        uneven: pretrained probability of the right action spread over [0, 0.72] instead of 0.3 for all.
        optimizer: Adam with (0.9, 0.99), or plain gradient steps.
    """

    prompts: int = 8
    group: int = 8
    flips: float = 0.0
    uneven: bool = False
    optimizer: Literal["adam", "sgd"] = "adam"


class Instance(NamedTuple):
    """A problem and the policy it starts from."""

    target: Array  # (32, d)
    target_label: Array  # (32,)
    general: Array  # (32, d)
    general_label: Array  # (32,)
    start: Params
    key: Array


class Step(NamedTuple):
    """What a batch was made from, for methods and measurements that need expectations.

    Attributes:
        params, start: policy and reference.
        batch: prompts and random numbers.
        actions: (prompts, group).
        flips, beta: of the run.
        scale: weights of the optimizer's metric, like the parameters.
        uniform: (prompts, group) numbers that would pick other actions.
    """

    params: Params
    start: Params
    batch: Batch
    actions: Array
    flips: Array
    beta: Array
    scale: Params
    uniform: Array


class Streams(NamedTuple):
    """Both totals of one batch, and what is known of them.

    Attributes:
        plasticity, stability: P and S.
        statistics: in the ordinary inner product.
        metric: the same sums in the inner product of the optimizer's preconditioner.
        along: (blocks,) estimate of Var(P.S) for this S, from the scatter of p_i.S within groups.
        response_sq: (responses,) |p_i|^2, both blocks.
        advantages: (responses,) as they were applied.
        ids: (responses,) the prompt of each.
        logit_sq: (responses,) squared norm of log pi's derivative with respect to the logits.
        step: what the batch was made from.
    """

    plasticity: Params
    stability: Params
    statistics: BlockStatistics[Array]
    metric: BlockStatistics[Array]
    along: Array
    response_sq: Array | None = None
    advantages: Array | None = None
    ids: Array | None = None
    logit_sq: Array | None = None
    step: Step | None = None


Watch = Callable[[Streams, Params], Array]
"""(streams, update) -> (k,) numbers of a step."""


class Decision(NamedTuple):
    """The update is a P + b S in each block, plus `extra`."""

    weights: Weights[Array]
    extra: Params
    state: Any


class Method(Protocol):
    """A rule with a memory: its first state, and at each step (share of training done) a decision with the next one.

    With advantages(rewards, ids, state), all of shape (responses,), it has others than GRPO's.
    """

    def start(self, params: Params) -> Any: ...

    def decide(self, streams: Streams, progress: Array, state: Any) -> Decision: ...


@dataclass(frozen=True)
class Memoryless:
    """Any rule of `pcr_core`."""

    rule: Rule

    def start(self, params: Params) -> Any:
        return ()

    def decide(self, streams: Streams, progress: Array, state: Any) -> Decision:
        return Decision(self.rule(streams.statistics), jax.tree.map(jnp.zeros_like, streams.plasticity), state)


class Outcome(NamedTuple):
    """Of every run, shapes (methods, cells, instances). Accuracy is the probability of the right action.

    Attributes:
        target, general: accuracy at the end (mean over the last three evaluations).
        drawdown: how far accuracy on the general contexts fell below its start at its lowest.
        boost: median of b - 1 over the steps and blocks.
        capped: share of steps and blocks with b - 1 >= 10.
        conflict: share of steps and blocks with P.S < 0.
        shared_early, shared_late: v_ps/c, sums over the first and the last third of steps.
        ratio: median of v_p/v_s.
        shift: mean of what GRPO's advantages were lowered by.
        taken: mean share of sum A_i^2 |y_i|^2, A GRPO's advantages, that was taken away by it.
        watched: means over steps of what `watch` returned, (methods, cells, k, instances); 0 without it.
    """

    target: Any
    general: Any
    drawdown: Any
    boost: Any
    capped: Any
    conflict: Any
    shared_early: Any
    shared_late: Any
    ratio: Any
    shift: Any
    taken: Any
    watched: Any


def simulate(
    regime: Regime, methods: Sequence[Method], cells: ArrayLike, seeds: Sequence[int], watch: Watch | None = None
) -> Outcome:
    """GRPO on one instance per seed, as NumPy arrays.

    Args:
        regime: see there.
        methods: hashable.
        cells: (methods, cells, 2) learning rate and beta of every run of a method; beta may be 0.
        seeds: one per instance.
        watch: what is measured in every step besides.
    """
    instances = _instances(regime.uneven, jnp.asarray(seeds))
    shape = replace(regime, flips=0.0, uneven=False)  # what programs are compiled for
    out = _run(shape, tuple(methods), watch, instances, jnp.asarray(cells, jnp.float32), jnp.float32(regime.flips))
    return Outcome(*(np.moveaxis(np.asarray(x), 1, -1) for x in out))


def start_accuracy(regime: Regime, seeds: Sequence[int]) -> tuple[Any, Any]:
    """Of the pretrained policies on target and general contexts, each (instances,)."""
    both = jax.vmap(_accuracies)(_instances(regime.uneven, jnp.asarray(seeds)))
    return np.asarray(both[0]), np.asarray(both[1])


@partial(jax.jit, static_argnums=0)
def _instances(uneven: bool, seeds: Array) -> Instance:
    instances: Instance = jax.vmap(partial(_instance, uneven))(seeds)
    return instances


def _instance(uneven: bool, seed: Array) -> Instance:
    keys = jax.random.split(jax.random.key(seed), 7)
    contexts = jax.random.normal(keys[0], (2, CONTEXTS, INPUTS)) * (4 / INPUTS) ** 0.5
    labels = jax.random.randint(keys[1], (2, CONTEXTS), 0, ACTIONS)
    wrong = (labels[0] + jax.random.randint(keys[2], (CONTEXTS,), 1, ACTIONS)) % ACTIONS
    right_mass = jax.random.uniform(keys[3], (CONTEXTS, 1)) * 0.72 if uneven else jnp.full((CONTEXTS, 1), 0.3)
    right, other = jax.nn.one_hot(labels, ACTIONS), jax.nn.one_hot(wrong, ACTIONS)
    soft = jnp.concatenate([right_mass * right[0] + (0.72 - right_mass) * other + 0.28 / ACTIONS, right[1]])
    first = jax.random.normal(keys[4], (INPUTS, HIDDEN)) * INPUTS**-0.5
    second = jax.random.normal(keys[5], (HIDDEN, ACTIONS)) * (0.25 / HIDDEN) ** 0.5
    optimizer = optax.adam(0.02)

    def loss(params: Params) -> Array:
        return -jnp.mean(jnp.sum(soft * _log_policy(params, contexts.reshape(-1, INPUTS)), axis=1))

    def step(carry: tuple[Params, Any], _: None) -> tuple[tuple[Params, Any], None]:
        params, state = carry
        update, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, update), state), None

    start = Params(first, second)
    (start, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, PRETRAINING)
    return Instance(contexts[0], labels[0], contexts[1], labels[1], start, keys[6])


def _log_policy(params: Params, contexts: Array) -> Array:
    return jax.nn.log_softmax(jnp.tanh(contexts @ params.first) @ params.second)


def _accuracies(instance: Instance, params: Params | None = None) -> tuple[Array, Array]:
    policy = instance.start if params is None else params

    def accuracy(contexts: Array, labels: Array) -> Array:
        right = jnp.mean(jnp.exp(jnp.take_along_axis(_log_policy(policy, contexts), labels[:, None], axis=1)))
        return jnp.where(jnp.isfinite(right), right, 0.0)  # a policy that diverged gets nothing right

    return accuracy(instance.target, instance.target_label), accuracy(instance.general, instance.general_label)


class Batch(NamedTuple):
    """One step's random numbers, common to all runs of an instance."""

    contexts: Array  # (prompts, d)
    labels: Array  # (prompts,)
    uniform: Array  # (prompts, group), picks the actions
    flip: Array  # (prompts, group) boolean


def draw(regime: Regime, flips: Array, instance: Instance, step: Array) -> Batch:
    """The prompts of a step and the numbers that pick actions and flip rewards."""
    keys = jax.random.split(jax.random.fold_in(instance.key, step), 3)
    which = jax.random.permutation(keys[0], CONTEXTS)[: regime.prompts]
    shape = (regime.prompts, regime.group)
    flip = jax.random.uniform(keys[2], shape) < flips
    return Batch(instance.target[which], instance.target_label[which], jax.random.uniform(keys[1], shape), flip)


def responses(params: Params, start: Params, batch: Batch) -> tuple[Array, Array, Array]:
    """Actions, rewards and reference log-probabilities, each (prompts, group)."""
    cumulative = jnp.cumsum(jnp.exp(_log_policy(params, batch.contexts)), axis=1)
    actions = jnp.sum(batch.uniform[:, :, None] >= cumulative[:, None, :-1], axis=2)
    rewards = jnp.where(batch.flip, actions != batch.labels[:, None], actions == batch.labels[:, None])
    reference = jnp.take_along_axis(_log_policy(start, batch.contexts), actions, axis=1)
    return actions, rewards.astype(jnp.float32), reference


def streams(
    params: Params,
    contexts: Array,
    actions: Array,
    rewards: Array,
    reference: Array,
    beta: Array,
    scale: Params,
    advantages: Array | None = None,
) -> Streams:
    """Totals and statistics of both gradients, by the closed form of the network's derivative.

    Response i of prompt q has the gradients w_i e_i h_q' and w_i ((W2 e_i) * (1 - h_q^2)) x_q' with e_i = onehot - pi,
    w_i the stream's cotangent: |.|^2 factors into that of the two vectors.

    Args:
        scale: like the parameters, the metric's weight of every coordinate (1/sqrt of Adam's second moment).
        advantages: (responses,), GRPO's by default.
    """
    prompts, group = actions.shape
    hidden = jnp.tanh(contexts @ params.first)
    log_policy = jax.nn.log_softmax(hidden @ params.second)
    logp = jnp.take_along_axis(log_policy, actions, axis=1).reshape(-1, 1)
    ids = jnp.arange(prompts * group) // group
    if advantages is None:
        advantages = pcr_core.group_advantages(rewards.reshape(-1), ids)
    objective = pcr_core.grpo_objective(
        logp, logp, reference.reshape(-1, 1), advantages, jnp.ones_like(logp, dtype=bool), beta=beta
    )
    cotangents = jnp.stack([objective.plasticity_cotangent, objective.stability_cotangent]).reshape(2, prompts, group)
    error = jax.nn.one_hot(actions, ACTIONS) - jnp.exp(log_policy)[:, None, :]  # (prompts, group, K)
    slope = 1 - hidden**2

    def totals(cotangent: Array) -> tuple[Array, Array]:
        """(prompts, K) and (prompts, hidden): a prompt's derivative with respect to logits and to the first layer."""
        logits = jnp.einsum("qg,qgk->qk", cotangent, error)
        return logits, (logits @ params.second.T) * slope

    def gradient(parts: tuple[Array, Array]) -> Params:
        return Params(contexts.T @ parts[1], hidden.T @ parts[0])

    p, s = totals(cotangents[0]), totals(cotangents[1])
    plasticity, stability = gradient(p), gradient(s)
    back = (error @ params.second.T) * slope[:, None, :]  # (prompts, group, hidden)
    pairs = jnp.stack([cotangents[0] ** 2, cotangents[1] ** 2, cotangents[0] * cotangents[1]])
    dots = ((plasticity, plasticity), (stability, stability), (plasticity, stability))

    def sums(first: Params, weight_first: Array, weight_second: Array) -> BlockStatistics[Array]:
        """Statistics in the inner product weighted by `first`; weight_*: (prompts, inputs or K) factors of a row."""
        one = jnp.einsum("qgh,qh->qg", back**2, weight_first)
        two = jnp.einsum("qgk,qk->qg", error**2, weight_second)
        response = (pairs[..., None] * jnp.stack([one, two], axis=-1)).reshape(3, prompts * group, 2)
        stratum = jnp.stack(
            [
                jnp.stack([jnp.sum(a[1] * b[1] * weight_first, 1), jnp.sum(a[0] * b[0] * weight_second, 1)], axis=-1)
                for a, b in ((p, p), (s, s), (p, s))
            ]
        )
        plasticity_sq, stability_sq, dot = (
            jnp.stack([jnp.sum(a * b * w) for a, b, w in zip(x, y, first)]) for x, y in dots
        )
        size = jnp.asarray([float(INPUTS * HIDDEN), float(HIDDEN * ACTIONS)])
        return BlockStatistics(
            plasticity_sq,
            stability_sq,
            dot,
            pcr_core.stratified_variance(response[0], stratum[0], ids),
            pcr_core.stratified_variance(response[1], stratum[1], ids),
            pcr_core.stratified_covariance(response[2], stratum[2], ids),
            size,
        )

    ones = Params(jnp.ones(()), jnp.ones(()))
    square_x, square_h = jnp.sum(contexts**2, axis=1), jnp.sum(hidden**2, axis=1)
    plain = sums(ones, square_x[:, None] * jnp.ones((1, HIDDEN)), square_h[:, None] * jnp.ones((1, ACTIONS)))
    metric = sums(scale, contexts**2 @ scale.first, hidden**2 @ scale.second)
    along_s = jnp.stack(
        [
            jnp.einsum("qgh,qh->qg", back, contexts @ stability.first),
            jnp.einsum("qgk,qk->qg", error, hidden @ stability.second),
        ],
        axis=-1,
    )
    products = cotangents[0][..., None] * along_s  # p_i.S, (prompts, group, blocks)
    squares = (products**2).reshape(prompts * group, 2)
    along = pcr_core.stratified_variance(squares, jnp.sum(products, axis=1) ** 2, ids)
    one = jnp.einsum("qgh,q->qg", back**2, square_x) + jnp.einsum("qgk,q->qg", error**2, square_h)
    response_sq = (cotangents[0] ** 2 * one).reshape(-1)
    logit_sq = jnp.sum(error**2, axis=2).reshape(-1)
    return Streams(plasticity, stability, plain, metric, along, response_sq, advantages, ids, logit_sq)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    regime: Regime,
    methods: tuple[Method, ...],
    watch: Watch | None,
    instances: Instance,
    cells: Array,
    flips: Array,
) -> Outcome:
    """(methods, instances, cells); one method at a time, so that only its branch is computed."""

    def one_method(chosen: tuple[Array, Array]) -> Outcome:
        which, pairs = chosen
        train = jax.vmap(partial(_train, regime, methods, watch), in_axes=(None, None, None, 0))
        runs: Outcome = jax.lax.map(lambda instance: train(which, flips, instance, pairs), instances, batch_size=4)
        return runs

    out: Outcome = jax.lax.map(one_method, (jnp.arange(len(methods)), cells))
    return out


def _train(
    regime: Regime,
    methods: tuple[Method, ...],
    watch: Watch | None,
    which: Array,
    flips: Array,
    instance: Instance,
    cell: Array,
) -> Outcome:
    learning_rate, beta = cell
    adam = optax.scale_by_adam(0.9, 0.99)
    blocks = pcr_jax.select_blocks(instance.start, "all")
    start_general = _accuracies(instance)[1]

    branches = [partial(_decide, methods, i) for i in range(len(methods))]
    ids = jnp.arange(regime.prompts * regime.group) // regime.group
    advantages = [partial(_advantages, methods, i, ids) for i in range(len(methods))]

    def step(carry: Any, index: Array) -> Any:
        params, optimizer, state = carry
        batch = draw(regime, flips, instance, index)
        actions, rewards, reference = responses(params, instance.start, batch)
        correction = 1 - 0.99 ** jnp.maximum(index, 1)
        scale = jax.tree.map(lambda v: 1 / (jnp.sqrt(v / correction) + 1e-8), optimizer.nu)
        plain = (index == 0) | (regime.optimizer == "sgd")
        scale = jax.tree.map(lambda x: jnp.where(plain, jnp.ones_like(x), x), scale)
        applied = jax.lax.switch(which, advantages, rewards.reshape(-1), state)
        both = streams(params, batch.contexts, actions, rewards, reference, beta, scale, applied)
        fresh = jax.random.fold_in(jax.random.fold_in(instance.key, index), 99)  # 0 to 2 are draw's
        others = jax.random.uniform(fresh, actions.shape)
        both = both._replace(step=Step(params, instance.start, batch, actions, flips, beta, scale, others))
        decision = jax.lax.switch(which, branches, both, index / STEPS, state)
        weights = decision.weights
        update, _ = pcr_jax.resolve(both.plasticity, both.stability, both.statistics, lambda _: weights, blocks=blocks)
        update = Params(*(u + e for u, e in zip(update, decision.extra)))
        watched = jnp.zeros(1) if watch is None else watch(both, update)
        direction, optimizer = adam.update(update, optimizer)
        if regime.optimizer == "sgd":
            direction = update
        params = Params(*(p - learning_rate * u for p, u in zip(params, direction)))
        given = pcr_core.group_advantages(rewards.reshape(-1), ids)
        kept = jnp.where(applied == 0, 0.0, both.response_sq / jnp.where(applied == 0, 1.0, applied) ** 2)  # |y_i|^2
        energy = jnp.sum(given**2 * kept)
        taken = 1 - jnp.sum(both.response_sq) / jnp.where(energy == 0, 1.0, energy)
        shifted = jnp.mean(given - applied), jnp.where(energy == 0, 0.0, taken)
        return (params, optimizer, decision.state), (weights.stability - 1, both.statistics, shifted, watched)

    def stretch(carry: Any, start: Array) -> Any:
        carry, seen = jax.lax.scan(step, carry, start + jnp.arange(EVALUATE_EVERY))
        return carry, (*_accuracies(instance, carry[0]), seen)

    start = (instance.start, adam.init(instance.start), tuple(method.start(instance.start) for method in methods))
    _, (target, general, (boost, stats, (shift, taken), watched)) = jax.lax.scan(
        stretch, start, jnp.arange(0, STEPS, EVALUATE_EVERY)
    )
    third = STEPS // EVALUATE_EVERY // 3

    def shared(part: slice) -> Array:
        c = jnp.sum(stats.dot[part])
        return jnp.sum(stats.covariance[part]) / jnp.where(c == 0, 1.0, c)

    return Outcome(
        target=jnp.mean(target[-LAST:]),
        general=jnp.mean(general[-LAST:]),
        drawdown=start_general - jnp.minimum(jnp.min(general), start_general),
        boost=jnp.median(boost),
        capped=jnp.mean(boost >= 10),
        conflict=jnp.mean(stats.dot < 0),
        shared_early=shared(slice(None, third)),
        shared_late=shared(slice(-third, None)),
        ratio=jnp.median(stats.plasticity_var / jnp.maximum(stats.stability_var, 1e-30)),
        shift=jnp.mean(shift),
        taken=jnp.mean(taken),
        watched=jnp.mean(watched, axis=(0, 1)),
    )


def _advantages(methods: tuple[Method, ...], index: int, ids: Array, rewards: Array, states: tuple[Any, ...]) -> Array:
    own = getattr(methods[index], "advantages", None)
    given: Array = pcr_core.group_advantages(rewards, ids) if own is None else own(rewards, ids, states[index])
    return given


def _decide(
    methods: tuple[Method, ...], index: int, streams: Streams, progress: Array, states: tuple[Any, ...]
) -> Decision:
    decision = methods[index].decide(streams, progress, states[index])
    return decision._replace(state=(*states[:index], decision.state, *states[index + 1 :]))
