"""The bandit's expectations in closed form against averages over draws, and PCR taken apart against PCR."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pcr_core as pcr
from benchmarks.learning.bandit import Batch, Memoryless, Params, Regime, Step, Streams, responses, simulate, streams
from benchmarks.learning.boosts import PRODUCTS, Boost, Quieter, watch
from benchmarks.learning.expectations import (
    expected_plasticity,
    expected_stability,
    mean_score,
    other_actions,
    sampled_stability,
)

PROMPTS, GROUP, FLIPS, BETA = 3, 4, jnp.float32(0.2), jnp.float32(0.3)


def policy(seed: int) -> Params:
    rng = np.random.default_rng(seed)
    return Params(*(jnp.asarray(rng.normal(size=s) / 4, jnp.float32) for s in ((24, 32), (32, 10))))


def step_of(key: jax.Array, shift: float = 0.0) -> tuple[Step, Streams]:
    keys = jax.random.split(key, 3)
    rng = np.random.default_rng(5)
    contexts, labels = jnp.asarray(rng.normal(size=(PROMPTS, 24)), jnp.float32), jnp.asarray([0, 3, 7])
    uniform, flip = jax.random.uniform(keys[0], (PROMPTS, GROUP)), jax.random.uniform(keys[1], (PROMPTS, GROUP)) < FLIPS
    batch, params, start = Batch(contexts, labels, uniform, flip), policy(1), policy(2)
    actions, rewards, reference = responses(params, start, batch)
    scale = jax.tree.map(lambda x: 1.5 + jnp.sin(3 * x), params)
    advantages = pcr.group_advantages(rewards.reshape(-1), jnp.arange(PROMPTS * GROUP) // GROUP) - shift
    found = streams(params, contexts, actions, rewards, reference, BETA, scale, advantages)
    other = jax.random.uniform(keys[2], actions.shape)
    step = Step(params, start, batch, actions, FLIPS, BETA, scale, other)
    return step, found._replace(step=step)


def flat(params: Params) -> np.ndarray:
    return np.concatenate([np.asarray(x).ravel() for x in params])


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_expectations_are_the_means_of_many_draws(shift: float) -> None:
    draws = 10_000

    def both(key: jax.Array) -> tuple[Params, Params, Params]:
        step, found = step_of(key, shift)
        return found.plasticity, found.stability, sampled_stability(step, other_actions(step))

    keys = jax.random.split(jax.random.key(0), draws)
    drawn = jax.jit(jax.vmap(both))(keys)
    step, _ = step_of(keys[0])
    expected = expected_plasticity(step), expected_stability(step), expected_stability(step)
    for values, mean in zip(drawn, expected):
        sample = np.concatenate([np.asarray(x).reshape(draws, -1) for x in values], axis=1)
        error = np.sqrt((sample.var(axis=0) / draws).sum())
        assert np.linalg.norm(sample.mean(axis=0) - flat(mean)) < 1.5 * error
        assert np.linalg.norm(flat(mean)) > 5 * error  # else nothing was tested


def test_the_stability_gradient_is_that_of_its_actions() -> None:
    step, found = step_of(jax.random.key(1))
    np.testing.assert_allclose(flat(sampled_stability(step, step.actions)), flat(found.stability), atol=1e-6)


def test_a_shift_of_advantages_adds_the_mean_score() -> None:
    step, plain = step_of(jax.random.key(1))
    _, shifted = step_of(jax.random.key(1), 0.7)
    added = flat(shifted.plasticity) - flat(plain.plasticity)
    np.testing.assert_allclose(added, 0.7 * flat(mean_score(step, step.actions)), atol=1e-6)


def test_taken_apart_and_put_together() -> None:
    _, found = step_of(jax.random.key(2))
    added = {
        kind: flat(Boost(along=kind, sized="sampled").decide(found, jnp.asarray(0.0), ()).extra)
        for kind in ("sampled", "expected", "noise")
    }
    b = pcr.PCR(alpha=0.5)(found.statistics).stability - 1
    assert (np.asarray(b) > 0).all()
    whole = np.concatenate([np.asarray(m * x).ravel() for m, x in zip(b, found.stability)])
    np.testing.assert_allclose(added["sampled"], whole, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(added["expected"] + added["noise"], whole, rtol=1e-3, atol=1e-6)
    parts = [flat(Boost(part=part).decide(found, jnp.asarray(0.0), ()).extra) for part in ("shift", "unshifted")]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-3, atol=1e-6)
    assert abs(parts[0] @ parts[1]) < 1e-4 * (whole @ whole)


def test_what_is_watched() -> None:
    """Of the update P + S + 0.5 Z."""
    step, found = step_of(jax.random.key(3))
    score = mean_score(step, step.actions)
    update = Params(*(p + s + 0.5 * z for p, s, z in zip(found.plasticity, found.stability, score)))
    seen = dict(zip(PRODUCTS, np.asarray(watch(found, update)), strict=True))
    assert seen["shift"] == pytest.approx(0.5, rel=1e-4)
    assert seen["on_score"] == pytest.approx(1, rel=1e-4)
    assert seen["on_step_and_score"] == pytest.approx(1, rel=1e-4)
    assert all(0 <= seen[name] < 0.9 for name in PRODUCTS if name.startswith("on_") and not name.endswith("_score"))
    assert 0 < seen["on_other_score"] < 0.9
    p, s, z = flat(found.plasticity), flat(found.stability), flat(score)
    noise, kept = p - flat(expected_plasticity(step)), s - flat(expected_stability(step))
    assert seen["noise_noise"] == pytest.approx(noise @ noise, rel=1e-4)
    assert seen["pull_noise"] == pytest.approx(kept @ kept, rel=1e-4)
    assert seen["boost_noise"] == pytest.approx(0.5 * z @ noise, rel=1e-3)
    assert seen["on_step"] == pytest.approx((z @ p) ** 2 / (z @ z) / (p @ p), rel=1e-3)
    plain = Params(*(p + s for p, s in zip(found.plasticity, found.stability)))
    assert not any(np.asarray(watch(found, plain))[PRODUCTS.index("shift") :])


@pytest.mark.slow
def test_whole_runs() -> None:
    regime, cells = Regime(prompts=4, group=4), [(0.005, 0.03)]
    methods = [
        Memoryless(pcr.PCR(alpha=0.5)),
        Boost(),
        Memoryless(pcr.GRPO()),
        Boost(alpha=0),
        Quieter(1.0),
        Quieter(0.0),
    ]
    out = simulate(regime, methods, [cells] * 6, [1, 2], watch)
    np.testing.assert_allclose(out.target[1], out.target[0], atol=2e-3)
    np.testing.assert_allclose(out.target[3:5], out.target[[2, 2]], atol=2e-3)
    assert np.isfinite(out.watched).all()
    seen = dict(zip(PRODUCTS, np.moveaxis(out.watched[:, 0], 1, 0), strict=True))
    assert (seen["update_noise"][5] < 0.2 * seen["noise_noise"][5]).all()
    assert (seen["on_score"][0] > 1.5 * seen["on_other_score"][0]).all()  # the others are others
