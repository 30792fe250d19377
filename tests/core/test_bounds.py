"""The error bounds themselves: they hold what they must, and they are not so wide that they hold everything."""

from __future__ import annotations

import math
from dataclasses import fields
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pcr_core as pcr
from pcr_conformance import enclosure, grid, oracle
from pcr_conformance.cases import Case
from pcr_conformance.interval import Interval
from pcr_conformance.rounding import Arithmetic, Summation, gamma, likely_gamma, unit_roundoff
from pcr_conformance.strategies import cases
from pcr_conformance.tolerances import errors

RULES = (
    pcr.PCR(alpha="variance"),
    pcr.PCR.paper(update="literal"),
    pcr.PCR(alpha="snr", gate="probability"),
    pcr.PCR(alpha=0.3, max_boost=0.7),
    pcr.PCR(alpha="variance", prior=pcr.ShrinkagePrior(), conflict="debiased"),
    pcr.HardProjection(),
    pcr.FixedAlpha(0.3),
    pcr.PCGrad(),
    pcr.MGDA(),
    pcr.GRPO(),
    pcr.NoAnchor(),
)
FLOAT32 = Arithmetic("float32")


@settings(max_examples=50)
@given(case=cases(largest_exponent=5), rule=st.sampled_from(RULES), seed=st.integers(0, 2**32 - 1))
def test_weights_of_statistics_within_their_errors_are_enclosed(case: Case, rule: pcr.Rule, seed: int) -> None:
    """Exact weights of any statistics that an implementation may come to lie in the intervals."""
    rng = np.random.default_rng(seed)
    for stats, error in zip(oracle.statistics(case), errors(case, FLOAT32)):
        radii = {name: getattr(error, name) for name in enclosure.FIELDS}
        may = enclosure.weights(rule, enclosure.around(stats, FLOAT32, radii))
        for _ in range(3):
            signs = rng.choice([-1.0, -0.5, 0.0, 1.0], size=len(radii))
            moved = {f: getattr(stats, f) + Fraction(sign * radii[f]) for f, sign in zip(radii, signs)}
            moved |= {f: max(moved[f], Fraction(0)) for f in ("p2", "s2", "vp", "vs")}
            if moved["c"] ** 2 > moved["p2"] * moved["s2"]:
                continue  # of no two vectors
            pair = oracle.weights(rule, oracle.Stats(d=stats.d, **moved))
            for name, got, held in (("a", pair.a, may.a), ("b", pair.b, may.b), ("alpha", pair.alpha, may.alpha)):
                if got is not None and held is not None:
                    assert held.lo <= got <= held.hi, f"{name} = {float(got)} is outside {held}"


def test_an_ordinary_case_is_enclosed_narrowly() -> None:
    rng = np.random.default_rng(0)
    p, s = rng.normal(size=(2, 8, 16))
    case = Case(p, s - 2 * p, np.repeat([0, 1], 4), (16,))
    (stats,), (error,) = oracle.statistics(case), errors(case, FLOAT32)
    radii = {name: getattr(error, name) for name in enclosure.FIELDS}
    for rule in RULES:
        may = enclosure.weights(rule, enclosure.around(stats, FLOAT32, radii))
        assert may.b.hi - may.b.lo < 1e-3 * max(abs(may.b.hi), 1), f"{rule}: {may.b}"


def test_the_grid_is_exact() -> None:
    for dtype in ("float64", "float32", "bfloat16"):
        case = grid.case(seed=3, dtype=dtype, size=40)
        assert grid.statistics(case) == oracle.statistics(case)
        if dtype == "float32":
            assert np.array_equal(case.plasticity, case.plasticity.astype("f4"))
    with pytest.raises(ValueError, match="not on the grid"):
        grid.statistics(case.with_(plasticity=case.plasticity / 3))


@pytest.mark.parametrize("kind", ["any", "sequential", "blocked", "lanes", "tree", "pairwise"])
def test_float32_sums_are_within_the_bounds_of_their_order(kind: str) -> None:
    """Summed in the order that is declared: below both bounds, the statistical one a few deviations away."""
    case = grid.case(seed=1, dtype="float32", size=100_000)
    p = case.plasticity.sum(0).astype("f4")

    def last(x: Any) -> Any:
        return np.cumsum(x, axis=-1, dtype="f4")[..., -1]

    def tree(x: Any) -> Any:
        while len(x) > 1:
            x = last(np.pad(x, (0, -len(x) % 10)).reshape(-1, 10))
        return x[0]

    shuffled = np.random.default_rng(0).permutation
    summed = {
        "any": lambda x: last(shuffled(x)),
        "sequential": last,
        "blocked": lambda x: last(last(x.reshape(-1, 100))),
        "lanes": lambda x: last(last(x.reshape(-1, 100).T)),
        "tree": lambda x: tree(last(x.reshape(-1, 100))),
        "pairwise": np.sum,
    }[kind](p * p)
    order = Summation(kind, 128 if kind == "pairwise" else 100, fan_in=10)  # type: ignore[arg-type]
    exact = float(grid.statistics(case)[0].p2)
    off = abs(float(summed) - exact)
    certain, likely = (errors(case, Arithmetic("float32", order, likely=x))[0].p2 for x in (False, True))
    assert off <= likely <= certain
    assert likely < 12 * order.depth(100_000) ** 0.5 * unit_roundoff("float32") * exact
    if kind in ("any", "sequential"):
        assert likely < certain / 20


def test_one_accumulator_for_rows_and_coordinates_is_within_the_bound() -> None:
    """Every term after the first twelve is less than half a unit in the last place of the sum, and lost."""
    small = 2.0**-10.5 * 0.99
    p = np.full((12, 16), small)
    p[:, 0] = 1
    p[::2] *= -1
    case = Case(p, p, np.zeros(12, dtype=np.int64), (16,))
    dev = p.astype("f4")  # the mean is exactly 0
    summed = float(np.cumsum((dev * dev).T.ravel(), dtype="f4")[-1]) * 12 / 11
    exact = float(oracle.statistics(case)[0].vp)
    off = abs(summed - exact)
    assert off > 90 * unit_roundoff("float32") * exact, "twelve rows of sixteen, one after the other"
    assert off <= errors(case, FLOAT32)[0].vp


@pytest.mark.parametrize("power", [-60, -66, -70, 0])
def test_numbers_that_are_flushed_to_zero_are_within_the_bound(power: int) -> None:
    def flush(x: Any) -> Any:
        x = np.asarray(x, "f4")
        return np.where(np.abs(x) < np.finfo("f4").tiny, np.float32(0), x)

    def added(x: Any) -> Any:
        out = flush(x[0])
        for row in x[1:]:
            out = flush(out + flush(row))
        return out

    rng = np.random.default_rng(0)
    for _ in range(20):
        shape = rng.normal(size=(2, 6, 8)) * 10.0 ** rng.integers(-9, 1, size=(2, 6, 8))
        p, s = (shape * 2.0**power).astype("f4").astype(float)
        case = Case(p, s, np.zeros(6, dtype=np.int64), (8,))
        (stats,), (allowed,) = oracle.statistics(case), errors(case, FLOAT32)
        big_p, big_s = added(p), added(s)
        mean = flush(big_p / np.float32(6))
        dev = flush(flush(p) - mean)
        got = {
            "p2": added(flush(big_p * big_p)),
            "c": added(flush(big_p * big_s)),
            "vp": flush(added(flush(dev * dev).ravel()) * np.float32(1.2)),
        }
        for name, value in got.items():
            assert abs(float(value) - float(getattr(stats, name))) <= getattr(allowed, name), name


def test_subnormal_totals_that_are_flushed_are_within_the_bound() -> None:
    """Each addend is subnormal and flushed, their sum is not: what is lost is multiplied by a total that is large."""
    tiny = float(np.finfo("f4").tiny)
    p, s = np.full((4, 2), 0.75 * tiny), np.full((4, 2), 1e20)
    allowed = errors(Case(p, s, np.zeros(4, dtype=np.int64), (2,)), FLOAT32)[0]
    assert allowed.c >= float((p.sum(0) * s.sum(0)).sum())


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
def test_squares_less_squares_of_sums_are_within_their_bound(spread: float) -> None:
    """And only in theirs: of nearly identical responses, deviations keep digits that this way loses."""
    rng = np.random.default_rng(1)
    lost = 0.0
    for _ in range(20):
        p = (rng.normal(size=16) + spread * rng.normal(size=(8, 16))).astype("f4")
        case = Case(p.astype(float), p.astype(float), np.repeat([0, 1], 4), (16,))
        got = np.float32(0)
        for rows in (p[:4], p[4:]):
            total = np.cumsum(rows, axis=0, dtype="f4")[-1]
            squares, of_sum = (np.cumsum((x * x).ravel(), dtype="f4")[-1] for x in (rows, total))
            got += np.float32(4 / 3) * (squares - of_sum / np.float32(4))
        off = abs(float(got) - float(oracle.statistics(case)[0].vp))
        wide, narrow = (
            errors(case, Arithmetic("float32", Summation("any", scatter=kind)))[0].vp  # type: ignore[arg-type]
            for kind in ("squares", "deviations")
        )
        assert off <= wide
        lost = max(lost, off / narrow)
    if spread <= 1e-3:
        assert lost > 1


@pytest.mark.parametrize(
    "options", [{"kind": "random"}, {"kind": "any", "scatter": "k"}, {"kind": "lanes", "block": 0}, {"fan_in": 1}]
)
def test_an_order_that_means_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Summation(**({"kind": "tree"} | options))


def test_the_statistical_bound_is_far_below_the_certain_one_where_that_is_vacuous() -> None:
    u = unit_roundoff("float32")
    assert gamma(2e7, u) == math.inf
    assert likely_gamma(2e7, u) < 3e-3


def test_intervals_divide_by_what_may_be_zero() -> None:
    def interval(lo: float, hi: float) -> Interval:
        return Interval(lo, hi, Arithmetic("float64"))

    assert (interval(1, 2) / interval(0, 4)).lo == pytest.approx(0.25)
    assert (interval(1, 2) / interval(0, 4)).hi == math.inf
    assert (interval(-2, -1) / interval(0, 4)).lo == -math.inf
    assert (interval(-2, -1) / interval(0, 4)).hi == pytest.approx(-0.25)
    assert (interval(-1, 1) / interval(0, 4)).lo == -math.inf
    assert (interval(1, 2) / interval(0, 0)).hi == 0, "nothing to project on"
    assert (interval(1, 2) / interval(-4, 0)).hi == pytest.approx(-0.25)
    zero = interval(0, 0)
    assert (zero.share(zero).lo, zero.share(zero).hi) == (0.5, 0.5)
    open_share = interval(0, 1).share(interval(0, 1))
    assert (open_share.lo, open_share.hi) == (0.0, 1.0)


def test_every_statistic_has_a_bound() -> None:
    case = grid.case(seed=0, dtype="float32", size=10)
    assert all(getattr(errors(case, FLOAT32)[0], f.name) > 0 for f in fields(errors(case, FLOAT32)[0]))
