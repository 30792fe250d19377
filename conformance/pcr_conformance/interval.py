"""Intervals of float64 that hold every outcome of a formula evaluated in floating point, whatever its roundings.

Each operation widens its result by C roundings of the implementation's arithmetic and by float64's own, so a formula
evaluated on intervals encloses what an implementation may make of it, and its conditioning comes out by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pcr_conformance.rounding import FUNCTION, Arithmetic, C

_OWN = 2.0**-52  # of the endpoints' own arithmetic


@dataclass(frozen=True)
class Interval:
    """All numbers from `lo` to `hi`, as they are computed in `arithmetic`; endpoints may be infinite."""

    lo: float
    hi: float
    arithmetic: Arithmetic

    def __add__(self, other: Interval | float) -> Interval:
        y = self._with(other)
        return self._made(self.lo + y.lo, self.hi + y.hi)

    def __sub__(self, other: Interval | float) -> Interval:
        y = self._with(other)
        return self._made(self.lo - y.hi, self.hi - y.lo)

    def __rsub__(self, other: float) -> Interval:
        return self._with(other) - self

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo, self.arithmetic)

    def __mul__(self, other: Interval | float) -> Interval:
        y = self._with(other)
        corners = [_times(a, b) for a in (self.lo, self.hi) for b in (y.lo, y.hi)]
        return self._made(min(corners), max(corners))

    def __truediv__(self, other: Interval | float) -> Interval:
        """Everything where the divisor may be 0, and 0 where it is."""
        y = self._with(other)
        if y.lo == y.hi == 0:
            return Interval(0.0, 0.0, self.arithmetic)
        if y.lo < 0 < y.hi or (0 in (y.lo, y.hi) and self.lo < 0 < self.hi):
            return Interval(-math.inf, math.inf, self.arithmetic)
        if 0 in (y.lo, y.hi):  # all quotients of one sign, without a bound
            far = y.hi if y.lo == 0 else y.lo
            near = min((self.lo / far, self.hi / far), key=abs)
            return self._made(-math.inf, near) if (self.lo >= 0) != (far > 0) else self._made(near, math.inf)
        corners = [a / b for a in (self.lo, self.hi) for b in (y.lo, y.hi)]
        return self._made(min(corners), max(corners))

    def clipped(self, low: float, high: float) -> Interval:
        """Rounds nothing."""
        return Interval(min(max(self.lo, low), high), min(max(self.hi, low), high), self.arithmetic)

    def least(self, other: Interval) -> Interval:
        """Rounds nothing."""
        return Interval(min(self.lo, other.lo), min(self.hi, other.hi), self.arithmetic)

    def root(self) -> Interval:
        return self._made(math.sqrt(max(self.lo, 0.0)), math.sqrt(max(self.hi, 0.0)))

    def share(self, other: Interval) -> Interval:
        """x/(x + y) of two that are not negative; 1/2 where both are 0."""
        if self.hi == other.hi == 0:
            return Interval(0.5, 0.5, self.arithmetic)
        low, high = _share(self.lo, other.hi, 0.0), _share(self.hi, other.lo, 1.0)
        return self._made(low, high, roundings=2 * C).clipped(0.0, 1.0)

    def below_zero(self) -> Interval:
        """The chance that a normal number of this mean and variance 1 lies below 0."""
        low, high = (math.erfc(x / math.sqrt(2)) / 2 for x in (self.hi, self.lo))
        return self._made(low, high, roundings=2 * C + FUNCTION).clipped(0.0, 1.0)

    def _with(self, other: Interval | float) -> Interval:
        return other if isinstance(other, Interval) else Interval(other, other, self.arithmetic)

    def _made(self, lo: float, hi: float, roundings: int = C) -> Interval:
        unit, floor = roundings * self.arithmetic.unit + _OWN, self.arithmetic.floor
        # a zero that is exact stays exact, and what has a sign keeps it
        low = lo if lo == 0 or math.isinf(lo) else lo - unit * abs(lo) - floor
        high = hi if hi == 0 or math.isinf(hi) else hi + unit * abs(hi) + floor
        return Interval(max(low, 0.0) if lo >= 0 else low, min(high, 0.0) if hi <= 0 else high, self.arithmetic)


def _times(a: float, b: float) -> float:
    return 0.0 if 0 in (a, b) else a * b  # nothing times something finite, however large


def _share(x: float, y: float, empty: float) -> float:
    return x / (x + y) if x + y else empty
