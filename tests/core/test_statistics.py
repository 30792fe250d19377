"""The variance estimators: unbiased, additive, accurate, and NaN rather than wrong where ids are traced."""

from __future__ import annotations

import array_api_compat.numpy
import numpy as np
import pytest

import pcr_core as pcr
from pcr_core import statistics

DRAWS = 2000


def _draws(groups: int, size: int, d: int, spread: float, seed: int = 0):  # type: ignore[no-untyped-def]
    """Contributions of correlated streams: noise of covariance 0.6 between them, group means `spread` apart."""
    rng = np.random.default_rng(seed)
    means = spread * rng.normal(size=(2, groups, 1, d))
    noise = rng.normal(size=(DRAWS, 2, groups, size, d))
    noise[:, 1] = 0.6 * noise[:, 0] + 0.8 * noise[:, 1]
    return (means + noise).reshape(DRAWS, 2, groups * size, d), np.repeat(np.arange(groups), size)


@pytest.mark.parametrize(("groups", "size"), [(1, 2), (3, 2), (2, 5)])
def test_scatter_is_unbiased(groups: int, size: int) -> None:
    """Means of v_p, v_s and v_ps over many draws are trace Var(P), Var(S), Cov(P, S), up to Monte-Carlo error."""
    d = 3
    x, ids = _draws(groups, size, d, spread=2.0)
    estimates = np.asarray(
        [
            (s.plasticity_var[0], s.stability_var[0], s.covariance[0])
            for s in (pcr.contribution_statistics(p, q, group_ids=ids) for p, q in x)
        ]
    )
    n = groups * size
    error = estimates.std(0) / np.sqrt(DRAWS)
    np.testing.assert_array_less(np.abs(estimates.mean(0) - n * d * np.asarray([1, 1, 0.6])), 4.5 * error)


def test_pooling_overestimates_when_groups_differ() -> None:
    x, ids = _draws(6, 4, 3, spread=2.0)
    p, s = x[0]
    within = pcr.contribution_statistics(p, s, group_ids=ids)
    pooled = pcr.contribution_statistics(p, s, group_ids=ids, strata="batch")
    assert pooled.plasticity_var[0] > 2 * within.plasticity_var[0]


def test_conflict_probability_matches_the_spread_of_the_product() -> None:
    """The variance of P.S over draws is the formula's, with the true moments in it."""
    d, sp, ss = 5, 0.7, 0.3
    rng = np.random.default_rng(1)
    p, s = rng.normal(size=(2, d)) * 0.5
    draws_p, draws_s = p + sp * rng.normal(size=(200_000, d)), s + ss * rng.normal(size=(200_000, d))
    c = (draws_p * draws_s).sum(1)
    one = [np.asarray([x]) for x in (p @ p, s @ s, p @ s, d * sp**2, d * ss**2, 0.0, float(d))]
    predicted = (one[3] * one[1] + one[4] * one[0] + one[3] * one[4])[0] / d
    assert c.var() == pytest.approx(predicted, rel=0.02)
    chance = pcr.conflict_probability(pcr.BlockStatistics(*one), one[2])[0]
    assert (c < 0).mean() == pytest.approx(chance, abs=0.02)  # c is only nearly normal


def test_dense_and_streamed_statistics_agree() -> None:
    """`stratified_*` on norms, which an adapter has, equal the centred form on the contributions themselves."""
    x, ids = _draws(3, 4, 6, spread=1.0)
    p, s = x[0]
    stats = pcr.contribution_statistics(p, s, group_ids=ids, sizes=(2, 4))
    for block, i in ((slice(0, 2), 0), (slice(2, 6), 1)):
        pb, sb = p[:, block], s[:, block]
        sums_p, sums_s = (np.stack([z[ids == q].sum(0) for q in range(3)]) for z in (pb, sb))
        v = pcr.stratified_variance((pb**2).sum(1), (sums_p**2).sum(1), ids)
        c = pcr.stratified_covariance((pb * sb).sum(1), (sums_p * sums_s).sum(1), ids)
        np.testing.assert_allclose(v, stats.plasticity_var[i], rtol=1e-12)
        np.testing.assert_allclose(c, stats.covariance[i], rtol=1e-12)


def test_without_float64_the_statistics_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group means are then formed without a matmul, whose precision an accelerator may lower."""
    x, ids = _draws(3, 4, 6, spread=1.0)
    p, s = x[0].astype(np.float32)
    shuffled = np.random.default_rng(0).permutation(ids)
    wide = pcr.contribution_statistics(p, s, group_ids=shuffled, sizes=(2, 4))
    monkeypatch.setattr(statistics, "widest_float", lambda xp, x: xp.float32)
    monkeypatch.setattr(array_api_compat.numpy, "matmul", None)
    narrow = pcr.contribution_statistics(p, s, group_ids=shuffled, sizes=(2, 4))
    assert narrow.plasticity_var.dtype == np.float32
    for name, expected in vars(wide).items():
        np.testing.assert_allclose(getattr(narrow, name), expected, rtol=1e-4)


def test_stratified_variance_by_block_and_empty_strata() -> None:
    sq = np.asarray([[1.0, 4.0], [9.0, 4.0], [1.0, 0.0], [1.0, 0.0]])
    totals = np.asarray([[16.0, 16.0], [0.0, 0.0], [4.0, 0.0]])  # nobody is in stratum 1
    with np.errstate(all="raise"):  # nothing is divided by nobody
        v = pcr.stratified_variance(sq, totals, np.asarray([0, 0, 2, 2]))
    np.testing.assert_array_equal(v, [4.0, 0.0])


def test_small_variance_by_hand() -> None:
    """Responses of 0 and 1/2, about their mean: twice 2 (1/4)^2."""
    assert pcr.stratified_variance(np.asarray([0.0, 0.25]), np.asarray([0.25]), np.asarray([0, 0])) == 0.25


def test_pooled_variance_by_hand() -> None:
    """Responses of 0, 1, 2 about their mean, times 3/2; any ids will do."""
    c = np.asarray([[0.0], [1.0], [2.0]])
    stats = pcr.contribution_statistics(c, -2 * c, group_ids=np.asarray([5, 6, 7]), strata="batch")
    assert (stats.plasticity_var, stats.stability_var, stats.covariance) == (3, 12, -6)


def test_variance_is_never_negative() -> None:
    """Equal contributions: the difference of equal numbers rounds to either side of zero."""
    rng = np.random.default_rng(3)
    sign = []
    for _ in range(50):
        x = np.repeat(rng.normal(size=(1, 7)), 3, axis=0)
        sq, total = (x * x).sum(1), np.asarray([(x.sum(0) ** 2).sum()])
        sign.append(float(pcr.stratified_covariance(sq, total, np.zeros(3, dtype=int))))
        assert pcr.stratified_variance(sq, total, np.zeros(3, dtype=int)) >= 0
    assert min(sign) < 0  # so the clamp was needed


def test_nan_passes_the_clamp() -> None:
    v = pcr.stratified_variance(np.asarray([np.nan, 1.0]), np.asarray([1.0]), np.asarray([0, 0]))
    assert np.isnan(v)


def test_merge_refuses_a_mixture() -> None:
    scatter = pcr.Scatter(np.ones(1), np.ones(1), np.ones(1))
    stats = pcr.BlockStatistics(*[np.ones(1)] * 7)
    with pytest.raises(TypeError, match="expected Scatter, got BlockStatistics"):
        pcr.merge(scatter, stats)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_float32_sums_are_accurate(library: str) -> None:
    """A million float32 coordinates, nearly orthogonal streams: sums agree with float64 arithmetic to 1e-12."""
    xp = pytest.importorskip(library)
    rng = np.random.default_rng(4)
    p, s = rng.normal(size=(2, 2, 500_000)).astype(np.float32)
    ids = xp.asarray([0, 0])
    stats = pcr.contribution_statistics(xp.asarray(p), xp.asarray(s), group_ids=ids)
    big_p, big_s = p.astype(float).sum(0), s.astype(float).sum(0)
    scale = np.linalg.norm(big_p) * np.linalg.norm(big_s)
    assert abs(float(stats.dot[0]) - float(big_p @ big_s)) < 1e-12 * scale
    assert float(stats.plasticity_sq[0]) == pytest.approx(float(big_p @ big_p), rel=1e-12)


@pytest.mark.parametrize(
    ("ids", "strata", "known"),
    [
        ([0, 0, 0], 1, True),
        ([0, 0, 0], 2, True),  # nobody in the second
        ([0, 0, 1], 2, False),  # alone
        ([0, 0, 2], 2, False),  # an id without a stratum, beside an empty one
        ([0, 0, 7], 1, False),
        ([0, 7, 7], 1, False),  # that, and alone
        ([7, 7, 7], 1, False),
        ([-1, -1, -1], 1, False),
    ],
)
def test_bad_strata_are_nan_where_values_cannot_be_seen(
    ids: list[int], strata: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "is_traced", lambda *arrays: True)
    with np.errstate(all="ignore"):
        v = pcr.stratified_covariance(np.asarray([1.0, 4.0, 0.9]), np.asarray([8.0, 1.0])[:strata], np.asarray(ids))
    assert np.isfinite(v) == known
    assert np.isnan(v) == (not known)


def test_bad_strata_under_jit_are_nan() -> None:
    """A response alone in its stratum, whose norms differ by rounding either way, or an id without a stratum."""
    jax = pytest.importorskip("jax")
    run = jax.jit(pcr.stratified_variance)
    for off in (0.9, 1.0, 1.1):
        sq, total = jax.numpy.asarray([1.0, 1.0, off]), jax.numpy.asarray([2.0, 1.0])
        assert np.isnan(run(sq, total, jax.numpy.asarray([0, 0, 1])))
    sq, total = jax.numpy.asarray([1.0, 4.0, 1.0]), jax.numpy.asarray([2.0, 0.0])
    assert np.isnan(run(sq, total, jax.numpy.asarray([0, 0, 2])))
    assert np.isnan(run(sq, total, jax.numpy.asarray([5, 5, 5])))
    assert np.isfinite(run(sq, total, jax.numpy.asarray([0, 0, 0])))


def test_constant_ids_under_jit() -> None:
    """Ids from a closure are concrete, but what is computed from them inside a traced function is not."""
    jax = pytest.importorskip("jax")
    ids, x = jax.numpy.asarray([0, 0, 1, 1]), jax.numpy.asarray([[1.0], [2.0], [3.0], [5.0]])
    assert jax.jit(lambda c: pcr.contribution_statistics(c, c, group_ids=ids).plasticity_var)(x)[0] == 5
    assert jax.jit(lambda r: pcr.group_advantages(r, ids, scale="none"))(x[:, 0])[0] == -0.5
    assert jax.numpy.isfinite(jax.jit(lambda r: pcr.group_advantages(r, ids))(x[:, 0])).all()
    v = jax.jit(lambda r: pcr.stratified_variance(r, jax.numpy.asarray([9.0, 64.0]), ids))
    assert v(x[:, 0] ** 2) == 2 * (5 - 4.5) + 2 * (34 - 32)


def test_a_group_of_one_under_jit_is_nan() -> None:
    """Values cannot be looked at while tracing: what an error would have said comes out as NaN, flagged."""
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((3, 2))

    @jax.jit
    def run(ids):  # type: ignore[no-untyped-def]
        res = pcr.resolve(x, -x, group_ids=ids)
        return res.update, res.weights.finite

    update, finite = run(jax.numpy.asarray([0, 0, 1]))
    assert np.isnan(np.asarray(update)).all()
    assert not finite.any()
    update, finite = run(jax.numpy.asarray([0, 0, 0]))  # same shapes: no new trace
    assert finite.all()
    assert run._cache_size() == 1
