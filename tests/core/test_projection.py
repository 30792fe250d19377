"""The soft projection and its report, by hand where the laws' random cases hardly come."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import pcr_core as pcr
from pcr_core.projection import _root, ratio

PHI = 0.5 * math.erfc(1 / math.sqrt(2))  # P(x < -1) of a standard normal x


def _stats(p2=4.0, s2=1.0, c=-1.0, vp=3.0, vs=1.0, vps=-0.5, d=2.0):  # type: ignore[no-untyped-def]
    return pcr.BlockStatistics(*(np.asarray([x]) for x in (p2, s2, c, vp, vs, vps, d)))


def _chance(c: float, **stats: float) -> Any:
    return pcr.conflict_probability(_stats(c=c, **stats), np.asarray([c]))


@pytest.mark.parametrize("scale", [1e-140, 1.0, 1e140])
@pytest.mark.parametrize(
    ("p2", "s2", "vp", "vs", "deviation"),
    [
        (9.0, 4.0, 8.0, 0.0, 4.0),  # v_p |S|^2 alone
        (9.0, 4.0, 0.0, 8.0, 6.0),  # v_s |P|^2 alone
        (0.0, 0.0, 8.0, 4.0, 4.0),  # v_p v_s alone
        (9.0, 4.0, 8.0, 8.0, math.sqrt(16 + 36 + 32)),
    ],
)
def test_conflict_probability(p2: float, s2: float, vp: float, vs: float, deviation: float, scale: float) -> None:
    """One deviation below and above zero, each part of the variance on its own; no square overflows on the way."""
    stats = {"p2": p2 * scale, "s2": s2 * scale, "vp": vp * scale, "vs": vs * scale, "d": 2.0}
    assert _chance(deviation * scale, **stats) == pytest.approx(PHI, rel=1e-14)
    assert _chance(-deviation * scale, **stats) == pytest.approx(1 - PHI, rel=1e-14)


@pytest.mark.parametrize("largest", [0, 1, 2])
def test_conflict_probability_where_one_part_is_all(largest: int) -> None:
    """The three parts are 300 orders of magnitude apart: the largest is the deviation, whichever it is."""
    p2, s2, vp, vs = ((1e-300, 1e150, 1e150, 1e-300), (1e150, 1e-300, 1e-300, 1e150), (1e-300, 1e-300, 1e150, 1e150))[
        largest
    ]
    assert _chance(1e150, p2=p2, s2=s2, vp=vp, vs=vs, d=1.0) == pytest.approx(PHI, rel=1e-14)


@pytest.mark.parametrize(("c", "expected"), [(-0.5, 1.0), (0.0, 0.0), (0.5, 0.0)])
def test_without_noise_conflict_is_certain(c: float, expected: float) -> None:
    assert _chance(c, vp=0.0, vs=0.0) == expected


@pytest.mark.parametrize(
    "rule", [pcr.GRPO(), pcr.MGDA(), pcr.PCR(alpha="variance"), pcr.PCGrad()], ids=lambda r: type(r).__name__
)
@pytest.mark.parametrize("c", [-0.5, 0.0, 0.5])
def test_every_rule_reports_the_conflict(rule: pcr.Rule, c: float) -> None:
    w = rule(_stats(c=c))
    assert w.conflict == (c < 0)
    assert w.conflict_probability == _chance(c)


def test_debiased_conflict_is_reported() -> None:
    """c = -1 is all noise that the streams share: nothing is left of the conflict."""
    w = pcr.PCR(alpha="variance", conflict="debiased")(_stats(c=-1.0, vps=-1.5))
    assert (w.conflict, w.stability) == (False, 1)
    assert w.conflict_probability == pcr.conflict_probability(_stats(), np.asarray([0.5]))


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_cosine_that_rounds_beyond_one(sign: int) -> None:
    assert pcr.GRPO()(_stats(p2=1.0, s2=1.0, c=sign * (1 + 1e-15))).cosine == sign


@pytest.mark.parametrize("field", ["p2", "s2", "c", "vp", "vs", "vps"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite_is_what_all_statistics_are(field: str, value: float) -> None:
    with np.errstate(all="ignore"):
        w = pcr.PCR(alpha="variance")(_stats(**{field: value}))
    assert not w.finite
    assert np.isnan(w.stability)


def test_large_statistics_are_finite_though_their_sum_is_not() -> None:
    w = pcr.PCR(alpha="variance")(_stats(p2=1.5e308, s2=1.5e308, c=1.0))
    assert w.finite
    assert w.stability == 1


def test_noise_to_signal() -> None:
    """Noise without signal is infinite; unknown noise stays unknown."""
    assert pcr.GRPO()(_stats(s2=0.0, vs=2.0)).stability_nsr == math.inf
    assert pcr.GRPO()(_stats(s2=0.0, vs=0.0)).stability_nsr == 0
    assert pcr.GRPO()(_stats(s2=4.0, vs=2.0)).stability_nsr == 0.5
    assert np.isnan(pcr.GRPO()(_stats(s2=0.0, vs=math.nan)).stability_nsr)


def test_ratio() -> None:
    got = ratio(np, np.asarray([1.0, 1.0, 0.0, 3.0]), np.asarray([4.0, 0.0, 0.0, -0.5]), empty=0.25)
    np.testing.assert_array_equal(got, [0.25, 0.25, 0.25, -6.0])


def test_root() -> None:
    """What rounding leaves below zero counts as zero."""
    np.testing.assert_array_equal(_root(np, np.asarray([4.0, 0.25, 0.0, -1e-9, np.nan])), [2.0, 0.5, 0.0, 0.0, np.nan])
