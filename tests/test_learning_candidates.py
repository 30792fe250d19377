"""What the candidate rules of the experiment on uncertainty do where the answer is known."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import pcr_core as pcr
from benchmarks.learning.bandit import Params, Streams
from benchmarks.learning.experiments.uncertainty import (
    AdamMetric,
    BayesDecision,
    FilteredPull,
    NoiseConflict,
    Pooled,
    Ramp,
    WienerAlong,
)

P = Params(jnp.asarray([[-4.0, 3.0]]), jnp.asarray([[1.0], [2.0]]))
S = Params(jnp.asarray([[1.0, 0.0]]), jnp.asarray([[0.0], [-2.0]]))
ZERO = jnp.zeros(2)


def streams(*, covariance=ZERO, along=ZERO, stability_var=ZERO) -> Streams:
    """c = (-4, -4) and |S|^2 = (1, 4), with this noise; in the metric c is (-8, -4)."""
    square, dot = jnp.asarray([1.0, 4.0]), jnp.asarray([-4.0, -4.0])
    stats = pcr.BlockStatistics(jnp.asarray([25.0, 5.0]), square, dot, ZERO, stability_var, covariance, ZERO + 2)
    metric = pcr.BlockStatistics(
        jnp.asarray([99.0, 5.0]), square, dot * jnp.asarray([2.0, 1.0]), ZERO, ZERO, ZERO, ZERO + 2
    )
    return Streams(P, S, stats, metric, along)


def pull(method, given: Streams, progress: float = 0.0) -> np.ndarray:
    return np.asarray(method.decide(given, jnp.asarray(progress), method.start(P)).weights.stability)


def test_noise_conflict_counts_shared_noise_only():
    np.testing.assert_allclose(pull(NoiseConflict(), streams()), [1, 1])
    np.testing.assert_allclose(pull(NoiseConflict(), streams(covariance=jnp.asarray([-2.0, 3.0]))), [2, 1])
    np.testing.assert_allclose(pull(NoiseConflict(), streams(covariance=jnp.asarray([-99.0, 0.0]))), [11, 1])


def test_wiener_spares_what_is_certain_and_removes_pure_noise():
    np.testing.assert_allclose(pull(WienerAlong(), streams()), [1, 1])
    np.testing.assert_allclose(pull(WienerAlong(), streams(along=jnp.asarray([16.0, 8.0]))), [5, 1.5])


def test_metric_decides_in_the_metric():
    np.testing.assert_allclose(pull(AdamMetric(), streams()), [5, 1.5])


def test_pooled_decides_once_and_remembers():
    method = Pooled(decay=0.5)
    first = method.decide(streams(), jnp.asarray(0.0), method.start(P))
    np.testing.assert_allclose(first.weights.stability, [1.8, 1.8])
    assert first.state == (-4.0, 2.5)


def test_filtered_pull_looks_back():
    method = FilteredPull(gain=0.5)
    first = method.decide(streams(), jnp.asarray(0.0), method.start(P))
    assert not any(np.any(x) for x in first.extra)
    second = method.decide(streams(), jnp.asarray(0.0), first.state)  # M = S/2: half of -P.M/|M|^2 is 4 and 1
    for extra, s, boost in zip(second.extra, S, (4, 1)):
        np.testing.assert_allclose(extra, boost * s / 2)
    np.testing.assert_allclose(second.weights.stability, [1, 1])


def test_filter_follows_what_is_certain():
    method = FilteredPull()
    mean, _ = method.decide(streams(), jnp.asarray(0.0), method.start(P)).state
    for m, s in zip(mean, S):
        np.testing.assert_array_equal(m, s)


def test_bayes_decision_without_noise_is_the_constant():
    np.testing.assert_allclose(pull(BayesDecision(), streams()), [3, 1.5])
    np.testing.assert_allclose(pull(BayesDecision(), streams(stability_var=jnp.asarray([2.0, 1.0]))), [2, 1.25])


def test_bayes_decision_under_noise_is_the_expectation():
    draws = np.random.default_rng(0).normal(-4, 3, 200_000)
    expected = 1 + np.maximum(-draws, 0).mean() / 2
    assert pull(BayesDecision(), streams(along=jnp.asarray([9.0, 0.0])))[0] == pytest.approx(expected, rel=0.01)


def test_ramp_knows_the_step():
    np.testing.assert_allclose(pull(Ramp(), streams(), 0.5), [2, 2])
