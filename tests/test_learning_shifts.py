"""Advantages of the simulated bandit other than GRPO's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pcr_core as pcr
from benchmarks.learning.bandit import Memoryless, Params, Regime, simulate, streams
from benchmarks.learning.shifts import Constant, LeaveOneOut, Measured

IDS = jnp.asarray([0, 0, 0, 1, 1, 1])
REWARDS = jnp.asarray([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])


def step(advantages=None):
    rng = np.random.default_rng(0)
    contexts, first, second = (jnp.asarray(rng.normal(size=s)) for s in ((2, 24), (24, 32), (32, 10)))
    params = Params(0.2 * first, 0.2 * second)
    actions = jnp.asarray([[0, 3, 3], [1, 1, 2]])
    scale = jax.tree.map(jnp.ones_like, params)
    return params, streams(params, contexts, actions, REWARDS.reshape(2, 3), jnp.zeros((2, 3)), 0.1, scale, advantages)


def test_a_response_has_the_norm_of_what_it_contributes() -> None:
    """With one advantage that is not 0, the total is that response's contribution."""
    _, found = step(jnp.asarray([0.0, 0.0, 0.0, 0.0, 2.0, 0.0]))
    assert found.response_sq is not None
    expected = float(found.statistics.plasticity_sq.sum())
    np.testing.assert_allclose(found.response_sq, [0, 0, 0, 0, expected, 0], rtol=1e-5)


def test_the_shift_comes_from_earlier_steps() -> None:
    method = Measured(pcr.GRPO())
    params, _ = step()
    state = method.start(params)
    grpo = pcr.group_advantages(REWARDS, IDS)
    np.testing.assert_array_equal(method.advantages(REWARDS, IDS, state), grpo)
    _, found = step(grpo)
    state = method.decide(found, jnp.asarray(0.0), state).state
    expected = pcr.baseline_sums(found.response_sq, grpo, group_ids=IDS)
    np.testing.assert_allclose(jax.tree.leaves(state), jax.tree.leaves(expected), rtol=1e-6)
    sums = pcr.BaselineSums(jnp.float32(2.0), jnp.float32(4.0), *jnp.full(4, 1e-3))
    np.testing.assert_allclose(method.advantages(REWARDS, IDS, sums), grpo - method.shift(sums), rtol=1e-6)
    assert method.shift(sums) == pytest.approx(0.5, rel=0.01)
    assert Measured(pcr.GRPO(), share=0.5).shift(sums) == pytest.approx(0.25, rel=0.01)


def test_controls() -> None:
    grpo = pcr.group_advantages(REWARDS, IDS)
    np.testing.assert_allclose(Constant(pcr.GRPO(), -0.5).advantages(REWARDS, IDS, ()), grpo + 0.5, rtol=1e-6)
    params, found = step(grpo)
    method = Measured(pcr.GRPO(), proxy=True)
    sums = method.decide(found, jnp.asarray(0.0), method.start(params)).state
    # responses 1 and 2 are the same; the second group is not known
    one, two = np.asarray(found.logit_sq)[:2]
    known = (one + 2 * two) / 3
    assert float(sums.square) == pytest.approx(one + 2 * two + 3 * known, rel=1e-5)


def test_leave_one_out() -> None:
    found = LeaveOneOut(pcr.GRPO()).advantages(REWARDS, IDS, ())
    np.testing.assert_allclose(found, [1, -0.5, -0.5, 0, 0, 0], atol=1e-6)


@pytest.mark.slow
def test_states_are_finite_and_grpo_is_untouched() -> None:
    regime, cells = Regime(prompts=4, group=4), [(0.01, 0.03)]
    methods = [Memoryless(pcr.GRPO()), Measured(pcr.GRPO()), LeaveOneOut(pcr.GRPO())]
    out = simulate(regime, methods, [cells] * 3, [1, 2])
    assert all(np.isfinite(x).all() for x in out)
    np.testing.assert_allclose(out.shift[0], 0, atol=1e-7)
    np.testing.assert_allclose(out.taken[0], 0, atol=1e-6)
    assert (out.shift[1] < -0.1).all()
    assert (out.taken[1] > 0.02).all()
    assert (out.target[1] != out.target[0]).all()
