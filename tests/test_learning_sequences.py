"""The bandit with answers of several tokens: closed forms against differentiation, and its advantages."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pcr_core as pcr
from benchmarks.learning.bandit import Params, Regime
from benchmarks.learning.sequences import (
    CONTEXT,
    END,
    HIDDEN,
    INPUTS,
    LONGEST,
    SYMBOLS,
    Lengths,
    Treatment,
    _instance,
    contributions,
    inputs_of,
    log_policy,
    logit_norms,
    mask_of,
    respond,
    simulate,
    token_logp,
)


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    params = Params(jnp.asarray(rng.normal(size=(INPUTS, HIDDEN)) / 3), jnp.asarray(rng.normal(size=(HIDDEN, 5)) / 3))
    contexts = jnp.asarray(rng.normal(size=(40, CONTEXT)))
    return params, contexts, respond(params, contexts, jnp.asarray(rng.uniform(size=(40, LONGEST))))


def test_an_answer_ends_once(drawn) -> None:
    tokens = np.asarray(drawn[2])
    for answer, mask in zip(tokens, np.asarray(mask_of(drawn[2]))):
        first = int(np.argmax(answer == END)) if (answer == END).any() else LONGEST - 1
        assert mask.tolist() == [t <= first for t in range(LONGEST)]
        assert (answer[first + 1 :] == END).all()
    assert len({int(m.sum()) for m in np.asarray(mask_of(drawn[2]))}) == LONGEST, "all lengths must be there"


def test_answers_are_drawn_from_the_policy() -> None:
    """The first token of many responses to one prompt, against its probabilities."""
    rng = np.random.default_rng(1)
    params = Params(jnp.asarray(rng.normal(size=(INPUTS, HIDDEN)) / 3), jnp.asarray(rng.normal(size=(HIDDEN, 5)) / 2))
    contexts = jnp.asarray(np.repeat(rng.normal(size=(1, CONTEXT)), 4000, axis=0))
    tokens = respond(params, contexts, jnp.asarray(rng.uniform(size=(4000, LONGEST))))
    seen = np.bincount(np.asarray(tokens[:, 0]), minlength=5) / 4000
    every = [jnp.full((1, LONGEST), END).at[0, 0].set(k) for k in range(SYMBOLS + 1)]
    expected = [float(jnp.exp(token_logp(params, contexts[:1], t)[0, 0])) for t in every]
    np.testing.assert_allclose(seen, expected, atol=0.03)


def test_contributions_are_derivatives(drawn) -> None:
    params, contexts, tokens = drawn
    cotangent = jnp.sin(jnp.arange(40 * LONGEST, dtype=jnp.float32)).reshape(40, LONGEST) * mask_of(tokens)
    found = contributions(params, contexts, tokens, cotangent)
    expected = jax.jacrev(lambda p: jnp.sum(cotangent * token_logp(p, contexts, tokens), axis=1))(params)
    for mine, theirs in zip(found, expected):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_logit_norms_are_derivatives(drawn) -> None:
    params, contexts, tokens = drawn
    hidden, _ = log_policy(params, inputs_of(contexts, tokens))

    def logp(added):
        every = jax.nn.log_softmax(hidden @ params.second + added)
        return jnp.sum(jnp.take_along_axis(every, tokens[..., None], axis=-1)[..., 0] * mask_of(tokens))

    expected = jnp.sum(jax.grad(logp)(jnp.zeros((40, LONGEST, SYMBOLS + 1))) ** 2, axis=(1, 2))
    np.testing.assert_allclose(logit_norms(params, contexts, tokens), expected, rtol=1e-4)


def test_means() -> None:
    rewards, ids = jnp.asarray([1.0, 0.0, 0.0, 1.0]), jnp.asarray([0, 0, 1, 1])
    length = jnp.asarray([3.0, 1.0, 1.0, 4.0])
    grpo, rule = pcr.group_advantages(rewards, ids), pcr.GRPO()

    def given(**options):
        return Treatment(rule, **options).advantages(rewards, ids, length, jnp.asarray(0.25))

    np.testing.assert_allclose(given(), grpo - 0.25, rtol=1e-6)
    np.testing.assert_allclose(given(mean="others"), [1, -1, -1, 1])
    np.testing.assert_allclose(given(mean="length"), [0.25, -0.75, -0.8, 0.2], rtol=1e-6)


@pytest.mark.slow
def test_norm_and_logits_shift_and_length_hardly_does() -> None:
    rule = pcr.GRPO()
    methods = [Treatment(rule), *(Treatment(rule, weight=w) for w in ("norm", "length", "logits"))]  # type: ignore[arg-type]
    out = simulate(Regime(), methods, [[(0.003, 0.03)]] * 4, [1, 2])
    assert all(np.isfinite(x).all() for x in out)
    np.testing.assert_allclose(out.taken[0], 0, atol=1e-5)
    assert (out.taken[[1, 3]] > 0.2).all()
    assert (np.abs(out.shift[2]) < 0.2).all()


def test_lengths_of_right_and_wrong_answers() -> None:
    """The two sets of weights are drawn from, and a wrong answer is never the right one."""
    long, short = (0.0, 0.0, 0.0, 1.0, 1.0), (1.0, 1.0, 0.0, 0.0, 0.0)
    right, wrong = Lengths(right=long, wrong=short).draw(jax.random.key(0))
    assert set(np.asarray(right).ravel().tolist()) == {3, 4}
    assert set(np.asarray(wrong).tolist()) == {0, 1}
    one = Lengths(right=(0.0, 1.0, 0.0, 0.0, 0.0), wrong=(0.0, 1.0, 0.0, 0.0, 0.0))
    instance = jax.jit(functools.partial(_instance, one))(jnp.asarray(3))  # of one symbol: a fourth is alike by chance
    right_of = jnp.exp(jnp.sum(token_logp(instance.start, instance.target, instance.target_answer), axis=1))
    assert float(right_of.max()) < 0.6, "pretraining put everything on an answer that is right and wrong"
