"""Statistics of comparisons: paired intervals, Holm's correction, interquartile means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; `p` of a test against 0 where there is one, else NaN; `n` independent values."""

    mean: float
    low: float
    high: float
    p: float
    n: int

    def times(self, factor: float) -> Interval:
        """In other units."""
        return replace(self, mean=factor * self.mean, low=factor * self.low, high=factor * self.high)

    def __format__(self, spec: str) -> str:
        spec = spec or "+.4f"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def paired_interval(first: ArrayLike, second: ArrayLike) -> Interval:
    """Mean of first - second over instances, with the interval and p of a paired t test.

    Args:
        first, second: (n,) one number an instance, the same instances in the same order; n >= 2.

    Example:
        >>> f"{paired_interval([1.0, 2.0, 4.0], [0.0, 1.0, 2.0]):+.2f}"
        '+1.33 [-0.10, +2.77]'
    """
    one, two = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if one.shape != two.shape or one.ndim != 1 or one.size < 2:
        raise ValueError(f"expected two arrays of one shape (n,), n >= 2, got {one.shape} and {two.shape}")
    difference = one - two
    if np.ptp(difference) == 0:
        value = float(difference[0])
        return Interval(value, value, value, 1.0 if value == 0 else 0.0, one.size)
    test = stats.ttest_1samp(difference, 0.0)
    low, high = test.confidence_interval(LEVEL)
    return Interval(float(difference.mean()), float(low), float(high), float(test.pvalue), one.size)


def interquartile_mean(values: ArrayLike, *, resamples: int = 9999) -> Interval:
    """Mean of the middle half, for few seeds with a stray one among them, with a bootstrap interval (percentile).

    Example:
        >>> interquartile_mean([0.0, 1.0, 1.0, 9.0]).mean
        1.0
    """
    x = np.asarray(values, dtype=float)

    def middle(sample: np.ndarray, axis: int) -> np.ndarray:
        trimmed: np.ndarray = stats.trim_mean(sample, 0.25, axis=axis)
        return trimmed

    mean = float(middle(x, axis=0))
    if np.ptp(x) == 0:
        return Interval(mean, mean, mean, float("nan"), x.size)
    found = stats.bootstrap(
        (x,), middle, n_resamples=resamples, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), float("nan"), x.size)


def ratio_of_means(first: ArrayLike, second: ArrayLike, *, resamples: int = 9999) -> Interval:
    """Mean of first over mean of second, with a bootstrap interval (percentile) over instances.

    Example:
        >>> f"{ratio_of_means([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]):.2f}"
        '0.50 [0.50, 0.50]'
    """
    one, two = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    chosen = np.random.default_rng(0).integers(0, one.size, (resamples, one.size))
    low, high = np.quantile(one[chosen].mean(axis=1) / two[chosen].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(one.mean() / two.mean()), float(low), float(high), float("nan"), one.size)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): all at or below 0.05 may be claimed together at that family-wise error.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.minimum(np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * factors), 1.0)
    back = np.empty_like(adjusted)
    back[order] = adjusted
    return [float(p) for p in back]
