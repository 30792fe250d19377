"""Priors: scalar gains with the right limits, and what each refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest

import pcr_core as pcr


def _one(x: float) -> np.ndarray:
    return np.asarray([x])


def test_flat_prior_believes_the_data() -> None:
    post = pcr.FlatPrior().posterior(_one(3.0), _one(7.0))
    assert (post.gain, post.variance) == (1.0, 7.0)


@pytest.mark.parametrize(
    ("sq", "v", "gain"),
    [
        (4.0, 1.0, 0.75),
        (0.5, 0.25, 0.5),
        (1.0, 1.5, 0.0),
        (1.0, 2.0, 0.0),
        (1.0, 1.0, 0.0),
        (2.0, 0.0, 1.0),
        (0.0, 0.0, 0.0),
        (0.0, 1.0, 0.0),
    ],
)
def test_shrinkage(sq: float, v: float, gain: float) -> None:
    post = pcr.ShrinkagePrior().posterior(_one(sq), _one(v))
    assert (post.gain, post.variance) == (gain, gain * v)


@pytest.mark.parametrize(("sq", "v"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (math.inf, math.inf)])
def test_shrinkage_hides_nothing(sq: float, v: float) -> None:
    assert np.isnan(pcr.ShrinkagePrior().posterior(_one(sq), _one(v)).gain)


def test_shrinkage_estimates_better_than_the_data() -> None:
    """Its purpose: over many draws the shrunk total is nearer to the truth (James and Stein)."""
    rng = np.random.default_rng(0)
    n, d = 8, 20
    mean = 0.5 * rng.normal(size=d)
    plain = shrunk = 0.0
    for _ in range(300):
        c = mean / n + rng.normal(size=(n, d)) / math.sqrt(n)
        stats = pcr.contribution_statistics(c, c, group_ids=np.zeros(n, dtype=int))
        gain = pcr.ShrinkagePrior().posterior(stats.plasticity_sq, stats.plasticity_var).gain
        total = c.sum(0)
        plain += ((total - mean) ** 2).sum()
        shrunk += ((gain * total - mean) ** 2).sum()
    assert shrunk < 0.6 * plain


def test_temporal_prior_averages_equal_steps() -> None:
    """discount = 1 is the running mean: gain 1/k and variance v/k at step k."""
    prior, variance = pcr.TemporalPrior(1.0), _one(math.inf)
    for k in range(1, 6):
        post = prior.posterior(_one(3.0), previous_variance=variance)
        variance = post.variance
        assert post.gain == pytest.approx(1 / k)
        assert variance == pytest.approx(3 / k)


def test_temporal_prior_settles_where_forgetting_balances_learning() -> None:
    """A fixed point of V/discount: gain 1 - discount."""
    prior, variance = pcr.TemporalPrior(0.9), _one(math.inf)
    for _ in range(300):
        post = prior.posterior(_one(2.0), previous_variance=variance)
        variance = post.variance
    assert post.gain == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("v", "before", "gain"), [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 0.0, 1.0), (5.0, math.inf, 1.0)]
)
def test_temporal_limits(v: float, before: float, gain: float) -> None:
    assert pcr.TemporalPrior().posterior(_one(v), previous_variance=_one(before)).gain == gain


def test_temporal_prior_takes_names() -> None:
    """Two arrays of one shape are easily swapped: the second goes by name only, the first by either."""
    prior = pcr.TemporalPrior()
    assert prior.posterior(variance=_one(1.0), previous_variance=_one(math.inf)).gain == 1
    with pytest.raises(TypeError):
        prior.posterior(_one(1.0), _one(2.0))  # type: ignore[misc]


def test_temporal_prior_hides_nothing() -> None:
    for v, before in ((math.nan, 1.0), (1.0, math.nan), (math.nan, 0.0)):
        assert np.isnan(pcr.TemporalPrior().posterior(_one(v), previous_variance=_one(before)).gain)


def test_temporal_prior_needs_a_state() -> None:
    stats = pcr.BlockStatistics(*[np.ones(1)] * 7)
    with pytest.raises(ValueError, match="TemporalPrior keeps state"):
        pcr.PCR(alpha="variance", prior=pcr.TemporalPrior())(stats)


@pytest.mark.parametrize("discount", [0.0, -1.0, 1.1, math.nan])
def test_discount_range(discount: float) -> None:
    with pytest.raises(ValueError, match="discount"):
        pcr.TemporalPrior(discount)


def test_a_step_that_is_not_finite_leaves_the_filter_of_its_block_as_it_was() -> None:
    rng = np.random.default_rng(0)
    p, s = rng.normal(size=(2, 4, 6))
    rule = pcr.PCR(alpha="variance", prior=pcr.TemporalPrior(0.7))
    ids = np.asarray([0, 0, 1, 1])
    first = pcr.resolve(p, s, group_ids=ids, sizes=(2, 4), rule=rule).state
    poisoned = p.copy()
    poisoned[1, 0] = np.nan
    second = pcr.resolve(poisoned, s, group_ids=ids, sizes=(2, 4), rule=rule, state=first)
    assert np.isnan(second.update[:2]).all()
    assert np.isfinite(second.update[2:]).all()
    assert first is not None
    assert second.state is not None
    np.testing.assert_array_equal(second.state.plasticity_mean[:2], first.plasticity_mean[:2])
    assert second.state.plasticity_var[0] == first.plasticity_var[0]
    assert np.isfinite(pcr.resolve(p, s, group_ids=ids, sizes=(2, 4), rule=rule, state=second.state).update).all()
