"""Long vectors whose sums are known exactly: integers times a power of two, of as many bits as the dtype holds.

Sums of products of such numbers are sums of integers, which NumPy adds up in int64 once each factor is cut in two.
Totals of a few rows are exact in float64, so what an implementation loses it loses in its long sums.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from pcr_conformance.cases import Case, Integers, group_slots
from pcr_conformance.oracle import Stats
from pcr_conformance.rounding import significand_bits

_HALF = 14  # bits of the lower part of a factor
_MOST = 27
SCALE = 2.0**-10
GROUPS = np.asarray([0, 0, 1, 1])


def case(seed: int, dtype: str, size: int, sign: int = -1, power: int = 0) -> Case:
    """Four responses in two groups, one block; P.S has the given sign; all in units of 2^power."""
    rng = np.random.default_rng(seed)
    bound = 2 ** min(significand_bits(dtype), _MOST)
    p, s = (rng.integers(-bound + 1, bound, size=(4, size)) for _ in range(2))
    if np.sign(float(p.sum(0) @ s.sum(0).astype(float))) != sign:
        s = -s
    unit = SCALE * 2.0**power
    return Case(p.astype(np.float64) * unit, s.astype(np.float64) * unit, GROUPS, (size,), regime="long")


def statistics(case: Case, power: int = 0) -> list[Stats]:
    """As `oracle.statistics`, for one block on the grid."""
    p, s = (_integers(x, SCALE * 2.0**power) for x in (case.plasticity, case.stability))
    unit = Fraction(SCALE * 2.0**power) ** 2
    big_p, big_s = p.sum(0), s.sum(0)
    dots = [dot(x, y) * unit for x, y in ((big_p, big_p), (big_s, big_s), (big_p, big_s))]
    strata = group_slots(case.group_ids)
    scatters = [sum((_scatter(x[rows], y[rows]) for rows in strata), Fraction(0)) for x, y in ((p, p), (s, s), (p, s))]
    return [Stats(dots[0], dots[1], dots[2], scatters[0] * unit, scatters[1] * unit, scatters[2] * unit, p.shape[1])]


def dot(x: Integers, y: Integers) -> int:
    """Exact inner product of integers of up to 31 bits, at most 2^28 of them."""
    (x1, x0), (y1, y0) = (_halves(v) for v in (x, y))
    high, middle, low = int(x1 @ y1), int(x1 @ y0) + int(x0 @ y1), int(x0 @ y0)
    return (high << 2 * _HALF) + (middle << _HALF) + low


def _scatter(x: Integers, y: Integers) -> Fraction:
    m = len(x)
    rows = sum(dot(a, b) for a, b in zip(x, y))
    return Fraction(m, m - 1) * (rows - Fraction(dot(x.sum(0), y.sum(0)), m))


def _halves(x: Integers) -> tuple[Integers, Integers]:
    return x >> _HALF, x & (2**_HALF - 1)


def _integers(x: object, unit: float) -> Integers:
    scaled = np.asarray(x) / unit
    whole: Integers = scaled.astype(np.int64)
    if not np.array_equal(whole, scaled):
        raise ValueError("not on the grid: expected integers times a power of two")
    return whole
