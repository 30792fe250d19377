"""The baseline from measured norms: unbiased, never above the variance of b = 0, and alike in every library."""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import pytest

import pcr_core as pcr

PROBABILITIES = np.asarray([0.1, 0.25, 0.65])
REWARDS = np.asarray([1.0, 0.3, 0.0])
SCORES = np.eye(3) - PROBABILITIES  # of a softmax policy with one response token


def batches(group: int, scale: Any) -> tuple[Any, Any, Any]:
    """Every group of responses: its probability, actions and advantages, (all,), (all, group), (all, group)."""
    actions = np.asarray(list(itertools.product(range(3), repeat=group)))
    advantages = [pcr.group_advantages(REWARDS[a], np.zeros(group, int), scale=scale) for a in actions]
    return PROBABILITIES[actions].prod(1), actions, np.asarray(advantages)


def total(applied: Any, actions: Any) -> Any:
    return (applied[..., None] * SCORES[actions]).sum(1)


def moments(probability: Any, totals: Any) -> tuple[Any, float]:
    mean = probability @ totals
    return mean, float(probability @ ((totals - mean) ** 2).sum(1))


@pytest.mark.parametrize("scale", ["group", "none"])
def test_the_mean_gradient_is_that_without_a_shift(scale: str) -> None:
    probability, actions, advantages = batches(3, scale)
    mean, _ = moments(probability, total(advantages, actions))
    for b in (-0.7, 0.4, 3.0):
        shifted, _ = moments(probability, total(advantages - b, actions))
        np.testing.assert_allclose(shifted, mean, atol=1e-14)


@pytest.mark.parametrize("group", [2, 4])
def test_the_variance_at_the_optimum_is_below_that_without(group: int) -> None:
    """Sums of all groups, each as often as it is drawn, give the optimum; up to twice that no variance is added."""
    probability, actions, advantages = batches(group, "none")
    y_sq = (SCORES[actions] ** 2).sum(2)
    product, square = probability @ (advantages * y_sq).sum(1), probability @ (y_sq).sum(1)
    best = product / square
    _, without = moments(probability, total(advantages, actions))
    found = {k: moments(probability, total(advantages - k * best, actions))[1] for k in (0.0, 0.5, 0.9, 1.0, 1.1, 2.0)}
    assert found[1.0] == min(found.values())
    assert found[1.0] < 0.97 * without
    assert found[2.0] == pytest.approx(without)
    # what `variance_reduction` says of it, where groups are drawn as often as they are likely
    sums = pcr.BaselineSums(*(np.asarray(x) for x in (product, square, without, 0.0, 0.0, 0.0)))
    for k, variance in found.items():
        assert pcr.variance_reduction(sums, k * best) == pytest.approx(1 - variance / without)


def test_a_shift_that_is_measured_is_unbiased_where_it_is_applied_later() -> None:
    """E of (A - b(first batch)) y over the second batch, both enumerated; b(same batch) is biased."""
    probability, actions, advantages = batches(2, "group")
    mean, _ = moments(probability, total(advantages, actions))
    ids = np.zeros(2, int)
    shifts = np.asarray(
        [
            pcr.estimate_baseline(pcr.baseline_sums(a**2 * (SCORES[s] ** 2).sum(1), a, group_ids=ids)).ratio
            for a, s in zip(advantages, actions)
        ]
    )
    later = sum(w * (probability @ total(advantages - b, actions)) for w, b in zip(probability, shifts))
    np.testing.assert_allclose(later, mean, atol=1e-14)
    same = probability @ total(advantages - shifts[:, None], actions)
    assert np.abs(same - mean).max() > 0.01


def sample(seed: int = 0, groups: int = 6, size: int = 4) -> tuple[Any, Any, Any, Any]:
    """Advantages, |y|^2, group ids and weights."""
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(groups), size)
    advantages = pcr.group_advantages(rng.normal(size=ids.size), ids)
    return advantages, np.exp(0.5 * rng.normal(size=ids.size) + advantages), ids, rng.integers(1, 9, ids.size) / 4


def measured(b: float = 0.0, **changes: Any) -> pcr.BaselineSums[Any]:
    advantages, y_sq, ids, h = sample()
    c = advantages - b * h
    return pcr.baseline_sums(c**2 * y_sq, c, **{"group_ids": ids, "shift": b, "weight": h, **changes})


def test_sums_are_their_definition() -> None:
    advantages, y_sq, ids, h = sample()
    n, d = (np.bincount(ids, weights=x) for x in (advantages * h * y_sq, h**2 * y_sq))
    expected = n.sum(), d.sum(), (advantages**2 * y_sq).sum(), (n * n).sum(), (n * d).sum(), (d * d).sum()
    np.testing.assert_allclose(astuple(measured()), expected, rtol=1e-12)


@pytest.mark.parametrize("b", [-2.0, 0.3, 5.0])
def test_the_shift_that_was_applied_does_not_matter(b: float) -> None:
    np.testing.assert_allclose(astuple(measured(b)), astuple(measured()), rtol=1e-9)


def test_groups_are_added() -> None:
    advantages, y_sq, ids, h = sample()
    parts = [
        pcr.baseline_sums((advantages**2 * y_sq)[rows], advantages[rows], group_ids=ids[rows], weight=h[rows])
        for rows in (ids < 2, ids >= 2)
    ]
    np.testing.assert_allclose(astuple(parts[0] + parts[1]), astuple(measured()), rtol=1e-12)


def test_scales() -> None:
    """Gradients in other units: nothing changes. Advantages times t: b too. Weights times t: b over t."""
    advantages, y_sq, ids, h = sample()
    b = pcr.estimate_baseline(measured())

    def found(t_y: float, t_a: float, t_h: float) -> pcr.Baseline[Any]:
        a = t_a * advantages
        return pcr.estimate_baseline(pcr.baseline_sums(a**2 * t_y * y_sq, a, group_ids=ids, weight=t_h * h))

    for t in (1e-3, 7.0):
        np.testing.assert_allclose(astuple(found(t, 1, 1)), astuple(b), rtol=1e-9)
        np.testing.assert_allclose(astuple(found(1, t, 1)), (t * b.shift, t * b.ratio, t**2 * b.variance), rtol=1e-9)
        np.testing.assert_allclose(astuple(found(1, 1, t)), (b.shift / t, b.ratio / t, b.variance / t**2), rtol=1e-9)
    np.testing.assert_allclose(found(1, -1, 1).shift, -b.shift, rtol=1e-9)


def test_the_optimum_of_the_sums() -> None:
    sums = measured()
    best = float(pcr.estimate_baseline(sums).ratio)
    reductions = [float(pcr.variance_reduction(sums, k * best)) for k in (0, 0.5, 1, 1.5, 2)]
    assert max(reductions) == reductions[2]
    assert 0 < reductions[2] <= 1
    np.testing.assert_allclose([reductions[0], reductions[4]], 0, atol=1e-12)
    direct = (sum((a - best * h) ** 2 * y for a, y, _, h in zip(*sample()))) / float(sums.energy)
    assert 1 - reductions[2] == pytest.approx(direct)


def test_the_variance_is_that_of_the_estimate() -> None:
    """Over many draws of 40 groups, the mean of the estimated variance against the variance of the estimates."""
    rng = np.random.default_rng(1)
    ids = np.repeat(np.arange(40), 3)
    ratios, variances = [], []
    for _ in range(300):
        advantages = pcr.group_advantages(rng.normal(size=ids.size), ids)
        y_sq = np.exp(0.5 * rng.normal(size=ids.size) + 0.5 * advantages)
        found = pcr.estimate_baseline(pcr.baseline_sums(advantages**2 * y_sq, advantages, group_ids=ids))
        ratios.append(found.ratio)
        variances.append(found.variance)
    assert np.mean(variances) == pytest.approx(np.var(ratios), rel=0.2)


def test_shrinks_by_its_variance() -> None:
    found = pcr.estimate_baseline(measured())
    assert found.shift == pytest.approx(max(1 - found.variance / found.ratio**2, 0) * found.ratio)
    assert 0 < found.shift < found.ratio
    noisy = replace(measured(), product_sq=np.asarray(1e9))
    assert pcr.estimate_baseline(noisy).shift == 0


@pytest.mark.parametrize("rows", [slice(0, 4), slice(0, 1)], ids=["one group", "one response"])
def test_one_group_says_nothing(rows: slice) -> None:
    advantages, y_sq, ids, _ = (x[rows] for x in sample())
    found = pcr.estimate_baseline(pcr.baseline_sums(advantages**2 * y_sq, advantages, group_ids=ids))
    assert (found.shift, found.variance) == (0, math.inf)


def test_groups_of_equal_rewards_count_with_the_mean_norm_until_they_are_measured() -> None:
    """Applied with b != 0 they are measured, whatever b was; with b = 0 their mean norm is a guess."""
    advantages, y_sq, ids = (
        np.asarray([1.0, -1.0, 0.0, 0.0]),
        np.asarray([4.0, 1.0, 9.0, 9.0]),
        np.asarray([0, 0, 1, 1]),
    )

    def sums(b: float) -> pcr.BaselineSums[Any]:
        c = advantages - b
        return pcr.baseline_sums(c**2 * y_sq, c, group_ids=ids, shift=b)

    assert sums(0.0).square == pytest.approx(5 + 2 * 2.5)
    assert sums(0.25).square == pytest.approx(5 + 18)
    assert sums(0.0).product == sums(0.25).product == pytest.approx(3)
    nothing = pcr.baseline_sums(np.zeros(4), np.zeros(4), group_ids=ids)
    assert astuple(nothing) == (0,) * 6
    assert pcr.estimate_baseline(nothing).shift == 0
    assert pcr.variance_reduction(nothing, 0.3) == 0


def test_the_past_fades_and_waits_where_nothing_is_known() -> None:
    one, two = measured(), measured(shift=0.4)
    both = pcr.update_baseline_sums(one, two, memory=0.8)
    assert both.product == pytest.approx(0.8 * one.product + two.product)
    assert both.square_sq == pytest.approx(0.64 * one.square_sq + two.square_sq)
    for nothing in (pcr.BaselineSums(*np.zeros(6)), replace(two, cross=np.asarray(np.nan))):
        assert astuple(pcr.update_baseline_sums(one, nothing)) == astuple(one)
    for memory in (1.0, -0.1, math.nan, True):
        with pytest.raises(ValueError, match="memory"):
            pcr.update_baseline_sums(one, two, memory=memory)


def test_a_longer_memory_is_more_certain() -> None:
    parts = []
    for seed in range(6):
        advantages, y_sq, ids, h = sample(seed)
        parts.append(pcr.baseline_sums(advantages**2 * y_sq, advantages, group_ids=ids, weight=h))

    def variance(memory: float) -> float:
        sums = parts[0]
        for part in parts[1:]:
            sums = pcr.update_baseline_sums(sums, part, memory=memory)
        return float(pcr.estimate_baseline(sums).variance)

    assert variance(0.9) < variance(0.5) < variance(0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    advantages, y_sq, ids, _ = sample()
    y_sq[3] = value
    with np.errstate(invalid="ignore"):
        sums = pcr.baseline_sums(advantages**2 * y_sq, advantages, group_ids=ids)
        assert not np.isfinite(sums.product)
        assert math.isnan(pcr.estimate_baseline(sums).shift)


def test_bad_input_is_named() -> None:
    good = {"group_ids": np.zeros(2, int)}
    with pytest.raises(ValueError, match="response_sq: expected shape"):
        pcr.baseline_sums(np.ones((2, 3)), np.ones(2), **good)
    with pytest.raises(ValueError, match="applied: expected shape"):
        pcr.baseline_sums(np.ones(2), np.ones(3), **good)
    with pytest.raises(ValueError, match="weight: expected shape"):
        pcr.baseline_sums(np.ones(2), np.ones(2), weight=np.ones(1), **good)
    with pytest.raises(TypeError, match="applied: expected a real floating"):
        pcr.baseline_sums(np.ones(2), np.ones(2, int), **good)
    with pytest.raises(ValueError, match="no responses"):
        pcr.baseline_sums(np.ones(0), np.ones(0), group_ids=np.ones(0, int))


def library(name: str) -> Any:
    if name == "torch":
        return pytest.importorskip("torch").asarray
    if name == "strict":
        return pytest.importorskip("array_api_strict").asarray
    return pytest.importorskip("jax.numpy").asarray


@pytest.mark.parametrize("name", ["torch", "jax", "jax jit", "strict"])
def test_libraries_agree(name: str) -> None:
    array = library(name)
    advantages, y_sq, ids, h = sample()
    b = 0.25

    def all_of(sq: Any, c: Any, ids: Any, h: Any) -> tuple[Any, ...]:
        sums = pcr.baseline_sums(sq, c, group_ids=ids, shift=b, weight=h)
        sums = pcr.update_baseline_sums(sums, sums, memory=0.5)
        return (*astuple(sums), *astuple(pcr.estimate_baseline(sums)), pcr.variance_reduction(sums, b))

    c = advantages - b * h
    inputs = c**2 * y_sq, c, ids, h
    run = pytest.importorskip("jax").jit(all_of) if name == "jax jit" else all_of
    found = run(*(array(x) for x in inputs))
    np.testing.assert_allclose([float(x) for x in found], all_of(*inputs), rtol=2e-5)
