"""The variance-optimal shift of the advantages, from measured norms of responses' gradients (docs/baseline.md).

On policy response i contributes -c_i y_i to the plasticity gradient, c_i the advantage it was given, y_i the gradient
of its normalised log-likelihood. With c_i = A_i - b h_i the expected gradient does not depend on b where h_i times what
the loss normalises by is the same for all responses; its variance is least at

    b* = sum A_i h_i |y_i|^2 / sum h_i^2 |y_i|^2        (Weaver and Tao 2001; Greensmith, Bartlett and Baxter 2004)

A step's measurement becomes `BaselineSums`, `update_baseline_sums` adds it to what is known, `estimate_baseline` reads
b from that for the steps to come, and `variance_reduction` tells, at the next measurement, what b has done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Generic

from pcr_core._namespace import (
    ArrayT,
    at_least_float32,
    common_namespace,
    require_floating,
    require_shape,
    widest_float,
)
from pcr_core._numbers import is_number
from pcr_core.objective import group_membership

SMALLEST = 1e-4  # of the largest |c|: where c is smaller, |p|^2 may have left the range of float32


@dataclass(frozen=True)
class BaselineSums(Generic[ArrayT]):
    """Sums over groups, each of shape (). Those of other groups, micro-batches or devices are added.

    With N, D, E a group's sums of A_i h_i |y_i|^2, h_i^2 |y_i|^2 and A_i^2 |y_i|^2:

    Attributes:
        product: sum of N.
        square: sum of D.
        energy: sum of E.
        product_sq: sum of N^2.
        cross: sum of N D.
        square_sq: sum of D^2.
    """

    product: ArrayT
    square: ArrayT
    energy: ArrayT
    product_sq: ArrayT
    cross: ArrayT
    square_sq: ArrayT

    def __add__(self, other: BaselineSums[ArrayT]) -> BaselineSums[ArrayT]:
        mine: Any = self
        return BaselineSums(*(getattr(mine, f.name) + getattr(other, f.name) for f in fields(mine)))


@dataclass(frozen=True)
class Baseline(Generic[ArrayT]):
    """An estimate of b*, each of shape ().

    Attributes:
        shift: b, to be applied; the ratio shrunk by its own variance, and 0 where nothing is known.
        ratio: N/D, of which the shift is a share in [0, 1].
        variance: of the ratio, by (3) of docs/baseline.md; infinite where fewer than two groups are known.
    """

    shift: ArrayT
    ratio: ArrayT
    variance: ArrayT


def baseline_sums(
    response_sq: ArrayT,
    applied: ArrayT,
    *,
    group_ids: ArrayT,
    shift: float | ArrayT = 0.0,
    weight: ArrayT | None = None,
) -> BaselineSums[ArrayT]:
    """Sums of one micro-batch (docs/baseline.md, section 4).

    Where |c_i| is below 1e-4 of the largest, as in groups of equal rewards while b is 0, nothing is known of y_i; its
    |y_i|^2 is taken to be the mean of the others'. Where it is known of no response all sums are 0.

    Args:
        response_sq: (n,) |p_i|^2 of each response's contribution to P, summed over all blocks. Where the widest dtype
            is float32, in units in which they are above 1e-15: their squares are summed.
        applied: (n,) c_i, the advantages that the loss was given.
        group_ids: (n,) integers; responses to the same prompt share an id. May be traced.
        shift: b as it was applied, so that A_i = c_i + b h_i. A number, or a () array.
        weight: (n,) h_i; 1 by default.

    Returns:
        Sums in the widest dtype of the device. Input that is not finite makes them not finite.

    Raises:
        TypeError: arrays that are not floating, or of several libraries.
        ValueError: shapes that do not match, or no response.

    Example:
        Two responses; the gradient of the better one has twice the other's norm. Advantages of 0.4 and -1.6 have the
        least variance.

        >>> import numpy as np
        >>> sums = baseline_sums(np.asarray([4.0, 1.0]), np.asarray([1.0, -1.0]), group_ids=np.asarray([0, 0]))
        >>> float(sums.product), float(sums.square), float(estimate_baseline(sums).ratio)
        (3.0, 5.0, 0.6)
    """
    xp = common_namespace(response_sq=response_sq, applied=applied, group_ids=group_ids, weight=weight)
    require_floating(xp, response_sq=response_sq, applied=applied, weight=weight)
    require_shape((None,), "one number a response", response_sq=response_sq)
    r: Any = response_sq
    n = r.shape[0]
    if n == 0:
        raise ValueError("response_sq: there are no responses")
    require_shape((n,), "one number a response", applied=applied, weight=weight)
    same, count = group_membership(xp, group_ids, n, "group_ids")
    wide = widest_float(xp, r)
    r, c = xp.astype(r, wide), xp.astype(at_least_float32(xp, applied), wide)
    h = xp.ones_like(c) if weight is None else xp.astype(at_least_float32(xp, weight), wide)
    advantage = c + (shift if is_number(shift) else xp.astype(shift, wide)) * h

    size = xp.abs(c)
    known = ~(size <= SMALLEST * xp.max(size))  # a NaN is known, and shows
    measured = xp.where(known, r / xp.where(known, c, xp.ones_like(c)) ** 2, xp.zeros_like(r))
    number = xp.sum(xp.astype(known, wide))
    mean = xp.sum(measured) / xp.where(number == 0, xp.ones_like(number), number)
    y_sq = xp.where(known, measured, mean)

    product, square = (_by_group(xp, same, term) for term in (advantage * h * y_sq, h**2 * y_sq))
    share = 1 / xp.astype(count, wide)  # each response stands for its part of the group
    return BaselineSums(
        xp.sum(share * product),
        xp.sum(share * square),
        xp.sum(advantage**2 * y_sq),
        xp.sum(share * product**2),
        xp.sum(share * product * square),
        xp.sum(share * square**2),
    )


def _by_group(xp: Any, same: Any, term: Any) -> Any:
    """(n,) sum over each response's group; a NaN stays in its own."""
    return xp.sum(xp.where(same, term[None, :], xp.zeros_like(term)[None, :]), axis=1)


def update_baseline_sums(
    past: BaselineSums[ArrayT], new: BaselineSums[ArrayT], *, memory: float = 0.9
) -> BaselineSums[ArrayT]:
    """What is known after a measurement: the past, fading by `memory`, and the new sums.

    A measurement that is not finite, or in which nothing was known, leaves the past as it is.

    Args:
        past: earlier results of this function, or the first measurement.
        new: the measurement; of one batch, so sums of micro-batches or devices are added up before.
        memory: in [0, 1), weight of the past against the new; 1/(1 - memory) measurements are remembered.

    Raises:
        ValueError: a memory out of bounds.

    Example:
        >>> import numpy as np
        >>> one = BaselineSums(*np.ones(6))
        >>> sums = update_baseline_sums(one, one, memory=0.5)
        >>> float(sums.product), float(sums.product_sq)  # squares fade twice as fast
        (1.5, 1.25)
    """
    if not (is_number(memory) and 0 <= memory < 1):
        raise ValueError(f"memory: expected a number in [0, 1), got {memory!r}")
    xp = common_namespace(past=past.square, new=new.square)
    names = [f.name for f in fields(past)]
    square: Any = new.square
    usable = square > 0
    for name in names:
        usable = usable & xp.isfinite(getattr(new, name))
    fading = (memory, memory, memory, memory**2, memory**2, memory**2)
    kept = (
        xp.where(usable, fade * getattr(past, name) + getattr(new, name), getattr(past, name))
        for name, fade in zip(names, fading)
    )
    return BaselineSums(*kept)


def estimate_baseline(sums: BaselineSums[ArrayT]) -> Baseline[ArrayT]:
    """b* with its variance over groups, and the shift: b* times max(1 - variance/b*^2, 0) (equations 3 and 4 there).

    The shift is made for later batches. For the batch that the sums are of, it would be biased.

    Example:
        Two groups that agree on 0.5, and one of a single group, which says nothing.

        >>> import numpy as np
        >>> def sums(n, d):
        ...     n, d = np.asarray(n), np.asarray(d)
        ...     return BaselineSums(n.sum(), d.sum(), d.sum(), (n * n).sum(), (n * d).sum(), (d * d).sum())
        >>> [float(estimate_baseline(sums(*nd)).shift) for nd in (([1.0, 2.0], [2.0, 4.0]), ([1.0], [2.0]))]
        [0.5, 0.0]
    """
    xp = common_namespace(square=sums.square)
    product: Any = sums.product
    square: Any = sums.square
    unknown = square == 0
    square = xp.where(unknown, xp.ones_like(square), square)
    ratio = product / square
    concentration = sums.square_sq / square**2  # 1 over the number of groups, where they are alike
    scatter: Any = sums.product_sq - 2 * ratio * sums.cross + ratio**2 * sums.square_sq
    scatter = xp.where(scatter < 0, xp.zeros_like(scatter), scatter)  # after rounding
    free = 1 - concentration
    alone = unknown | (free < _ROUNDING)
    variance = scatter / (square**2 * xp.where(alone, xp.ones_like(free), free))
    variance = xp.where(alone, xp.full_like(variance, math.inf), variance)
    excess = ratio**2 - variance
    certain = excess > 0
    kept = xp.where(certain, excess / xp.where(certain, ratio, xp.ones_like(ratio)), xp.zeros_like(ratio))
    return Baseline(xp.where(xp.isnan(excess), excess, kept), ratio, variance)


_ROUNDING = 1e-6  # of float32 sums


def variance_reduction(sums: BaselineSums[ArrayT], shift: float | ArrayT) -> ArrayT:
    """Share of P's variance that a shift b takes away, (2 b N - b^2 D)/E; negative where it adds to it. Shape ().

    Unbiased in numerator and denominator where b is not made from these sums; 0 where nothing is known.

    Example:
        >>> import numpy as np
        >>> sums = baseline_sums(np.asarray([4.0, 1.0]), np.asarray([1.0, -1.0]), group_ids=np.asarray([0, 0]))
        >>> [round(float(variance_reduction(sums, b)), 3) for b in (0.0, 0.6, 1.2)]
        [0.0, 0.36, 0.0]
    """
    xp = common_namespace(energy=sums.energy)
    energy: Any = sums.energy
    b: Any = shift
    gained = 2 * b * sums.product - b**2 * sums.square
    nothing = energy == 0
    share: ArrayT = xp.where(nothing, xp.zeros_like(energy), gained / xp.where(nothing, xp.ones_like(energy), energy))
    return share
