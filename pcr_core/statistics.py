"""Sums that describe two gradients per block of parameters, and the noise in them (math.md section 2).

A response contributes c_i to a stream's total gradient. Responses to one prompt are independent draws, so the variance
of the total is estimated from their scatter within groups (strata). Everything PCR needs is seven numbers per block.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Literal, TypeVar, get_args

from pcr_core._namespace import (
    ArrayT,
    common_namespace,
    device_of,
    is_traced,
    require_floating,
    require_shape,
    widest_float,
)
from pcr_core.objective import group_membership

Strata = Literal["group", "batch"]


@dataclass(frozen=True)
class BlockStatistics(Generic[ArrayT]):
    """Sums over the coordinates of each block; every attribute has shape (blocks,) and one wide dtype.

    The three attributes of the noise are None, all of them, where it was not measured; a 0 is a measurement.

    Attributes:
        plasticity_sq: |P|^2, P the total plasticity gradient.
        stability_sq: |S|^2, S the total stability gradient, beta included.
        dot: P.S
        plasticity_var: v_p, estimate of trace Var(P), >= 0.
        stability_var: v_s, estimate of trace Var(S), >= 0.
        covariance: v_ps, estimate of trace Cov(P, S); zero when the streams come from different responses.
        size: d, number of coordinates.
    """

    plasticity_sq: ArrayT
    stability_sq: ArrayT
    dot: ArrayT
    plasticity_var: ArrayT | None
    stability_var: ArrayT | None
    covariance: ArrayT | None
    size: ArrayT

    @property
    def has_noise(self) -> bool:
        """Whether the noise was measured."""
        return self.plasticity_var is not None


@dataclass(frozen=True)
class Scatter(Generic[ArrayT]):
    """The noise half of the statistics, additive over strata, micro-batches and devices; shapes (blocks,)."""

    plasticity_var: ArrayT
    stability_var: ArrayT
    covariance: ArrayT


Mergeable = TypeVar("Mergeable", BlockStatistics[Any], Scatter[Any])


def merge(first: Mergeable, *others: Mergeable) -> Mergeable:
    """Field-wise sum: Scatter over any split into strata or shards, BlockStatistics over shards of the coordinates.

    BlockStatistics of different micro-batches must not be merged, since |P_1 + P_2|^2 is not a sum of squares: merge
    their Scatter and take the squares of the summed gradients.

    Example:
        >>> import numpy as np
        >>> one = Scatter(np.ones(2), np.ones(2), np.zeros(2))
        >>> merge(one, one).plasticity_var
        array([2., 2.])
    """
    merged = first
    for other in others:
        if type(other) is not type(first):
            raise TypeError(f"merge: expected {type(first).__name__}, got {type(other).__name__}")
        if [f.name for f in fields(first) if getattr(merged, f.name) is None] != [
            f.name for f in fields(first) if getattr(other, f.name) is None
        ]:
            raise ValueError("merge: the noise was measured in some of these and not in others")
        pairs = [(getattr(merged, f.name), getattr(other, f.name)) for f in fields(first)]
        merged = type(first)(*(None if one is None else one + two for one, two in pairs))
    return merged


def require_noise(stats: BlockStatistics[ArrayT], who: str) -> tuple[ArrayT, ArrayT, ArrayT]:
    """v_p, v_s and v_ps; ValueError that names who needs them where they were not measured."""
    noise = (stats.plasticity_var, stats.stability_var, stats.covariance)
    if noise[0] is None or noise[1] is None or noise[2] is None:
        raise ValueError(
            f"statistics: {who} needs the gradients' noise, which was not measured (plasticity_var is None)"
        )
    return noise[0], noise[1], noise[2]


def stratified_covariance(response_dot: ArrayT, stratum_dot: ArrayT, stratum_ids: ArrayT) -> ArrayT:
    """Unbiased estimate of trace Cov(P, S) from inner products within strata; may be negative.

    Args:
        response_dot: (n,) or (n, blocks), p_i.s_i of each response.
        stratum_dot: (q,) or (q, blocks), the same product of each stratum's summed contributions.
        stratum_ids: (n,) integers in [0, q): the stratum of each response. May be traced.

    Returns:
        () or (blocks,): sum over strata of m/(m - 1) (sum of response_dot - stratum_dot/m), m the stratum's size.

    Raises:
        ValueError: shapes that do not match, or a stratum of one response (NaN where ids are traced).
    """
    xp = common_namespace(response_dot=response_dot, stratum_dot=stratum_dot, stratum_ids=stratum_ids)
    require_floating(xp, response_dot=response_dot, stratum_dot=stratum_dot)
    r: Any = response_dot
    s: Any = stratum_dot
    ids: Any = stratum_ids
    if r.ndim not in (1, 2):
        raise ValueError(f"response_dot: expected shape (n,) or (n, blocks), got {tuple(r.shape)}")
    require_shape((None, *r.shape[1:]), "(strata, *blocks)", stratum_dot=s)
    if not xp.isdtype(ids.dtype, "integral"):
        raise TypeError(f"stratum_ids: expected integers, got {ids.dtype}")
    require_shape((r.shape[0],), "one id a response", stratum_ids=ids)
    wide = widest_float(xp, r)
    r, s = xp.astype(r, wide), xp.astype(s, wide)
    index = xp.arange(s.shape[0], dtype=ids.dtype, device=device_of(ids))
    member = xp.astype(ids[None, :] == index[:, None], wide)  # (q, n)
    m = xp.sum(member, axis=1)
    alone = m == 1
    known = xp.all((ids >= 0) & (ids < s.shape[0]))
    if not is_traced(m):  # ids of a closure are concrete under jax.jit, what is computed from them is not
        if bool(xp.any(alone)):
            raise ValueError(_SINGLETON.format(name="stratum_ids"))
        if not bool(known):
            raise ValueError(f"stratum_ids: expected integers in [0, {s.shape[0]}), one row of stratum_dot each")
    used = (m > 0) | ~known
    m = xp.where(used, m, xp.full_like(m, 2))
    # 1/(1 - 1) times a rounding error is an infinity of either sign, and the clamp would take one for a small variance
    m = xp.where(alone | ~known, xp.full_like(m, math.nan), m)
    if r.ndim == 2:
        member, m, used = member[:, :, None], m[:, None], used[:, None]
    within = xp.sum(member * r[None, ...], axis=1)
    terms = m / (m - 1) * (within - s / m)
    covariance: ArrayT = xp.sum(xp.where(used, terms, xp.zeros_like(terms)), axis=0)
    return covariance


def stratified_variance(response_sq: ArrayT, stratum_sq: ArrayT, stratum_ids: ArrayT) -> ArrayT:
    """Unbiased estimate of trace Var(P) from squared norms within strata (math.md section 2), clamped at 0.

    Args:
        response_sq: (n,) or (n, blocks), |c_i|^2 of each response's contribution.
        stratum_sq: (q,) or (q, blocks), |c_q|^2 of each stratum's summed contribution.
        stratum_ids: (n,) integers in [0, q). May be traced.

    Returns:
        () or (blocks,). Rounding can leave a difference of equal numbers below zero; it is clamped.

    Raises:
        ValueError: shapes that do not match, or a stratum of one response (NaN where ids are traced).

    Example:
        Two responses that contribute 1 and 3: twice their scatter about the mean, (1 - 2)^2 + (3 - 2)^2.

        >>> import numpy as np
        >>> float(stratified_variance(np.asarray([1.0, 9.0]), np.asarray([16.0]), np.asarray([0, 0])))
        4.0
    """
    v: Any = stratified_covariance(response_sq, stratum_sq, stratum_ids)
    xp = common_namespace(v=v)
    clamped: ArrayT = xp.where(v < 0, xp.zeros_like(v), v)  # unlike maximum, keeps NaN in every library
    return clamped


def contribution_statistics(
    plasticity: ArrayT,
    stability: ArrayT,
    *,
    group_ids: ArrayT,
    stability_group_ids: ArrayT | None = None,
    sizes: Sequence[int] | None = None,
    strata: Strata = "group",
) -> BlockStatistics[ArrayT]:
    """Statistics of dense per-response contributions, by the centred form of the scatter (no cancellation).

    Args:
        plasticity: (n, d) contribution of each response to the plasticity gradient, normalisation included.
        stability: (n, d), or (m, d) when it comes from other responses.
        group_ids: (n,) integer; responses to the same prompt share an id. May be traced.
        stability_group_ids: (m,) ids of the stability stream's own responses; the covariance is then zero.
        sizes: split of the d coordinates into consecutive blocks; one block by default.
        strata: scatter within "group"s, or about the mean of the whole "batch" (over-estimates when groups differ, but
            allows groups of one response).

    Raises:
        TypeError: integer arrays, or arrays of different libraries.
        ValueError: shapes that do not match, or a group of one response with strata="group".

    Example:
        >>> import numpy as np
        >>> p = np.asarray([[1.0, 0.0], [3.0, 0.0]])
        >>> stats = contribution_statistics(p, -p, group_ids=np.asarray([7, 7]))
        >>> float(stats.dot[0]), float(stats.plasticity_var[0]), float(stats.covariance[0])
        (-16.0, 4.0, -4.0)
    """
    if strata not in get_args(Strata):
        raise ValueError(f"strata: expected one of {get_args(Strata)}, got {strata!r}")
    xp = common_namespace(
        plasticity=plasticity, stability=stability, group_ids=group_ids, stability_group_ids=stability_group_ids
    )
    require_floating(xp, plasticity=plasticity, stability=stability)
    require_shape((None, None), "(responses, coordinates)", plasticity=plasticity)
    p: Any = plasticity
    n, d = p.shape
    shared = stability_group_ids is None
    require_shape((n if shared else None, d), "(responses, coordinates) of plasticity", stability=stability)
    sizes = (d,) if sizes is None else tuple(sizes)
    whole = all(isinstance(size, numbers.Integral) and not isinstance(size, bool) and size >= 1 for size in sizes)
    if not sizes or not whole or sum(sizes) != d:
        raise ValueError(f"sizes: expected positive numbers that add up to {d}, got {sizes}")

    wide = widest_float(xp, p)
    p, s = xp.astype(p, wide), xp.astype(stability, wide)
    p_centred, p_weight = _centred(xp, p, group_ids, strata, "group_ids")
    s_centred, s_weight = (
        _centred(xp, s, group_ids, strata, "group_ids")
        if shared
        else _centred(xp, s, stability_group_ids, strata, "stability_group_ids")
    )
    p_total, s_total = xp.sum(p, axis=0), xp.sum(s, axis=0)
    rows = []
    start = 0
    for size in sizes:
        block = slice(start, start + size)
        start += size
        pc, sc, pt, st = p_centred[:, block], s_centred[:, block], p_total[block], s_total[block]
        zero = xp.zeros_like(xp.sum(pt))
        rows.append(
            (
                xp.sum(pt * pt),
                xp.sum(st * st),
                xp.sum(pt * st),
                xp.sum(p_weight * xp.sum(pc * pc, axis=1)),
                xp.sum(s_weight * xp.sum(sc * sc, axis=1)),
                xp.sum(p_weight * xp.sum(pc * sc, axis=1)) if shared else zero,
                zero + size,
            )
        )
    return BlockStatistics(*(xp.stack(column) for column in zip(*rows)))


def _centred(xp: Any, c: Any, ids: Any, strata: Strata, name: str) -> tuple[Any, Any]:
    """(n, d) contributions less their stratum's mean, and (n,) the Bessel weight m/(m - 1) of their stratum."""
    n = c.shape[0]
    same, count = group_membership(xp, ids, n, name)
    if strata == "batch":
        if n < 2:
            raise ValueError(f"{name}: one response tells nothing of the variance; use more")
        bessel = n / (n - 1)
        return c - xp.mean(c, axis=0)[None, :], xp.sum(c * 0, axis=1) + bessel
    if not is_traced(count) and bool(xp.any(count < 2)):
        raise ValueError(_SINGLETON.format(name=name))
    m = xp.astype(count, c.dtype)
    member = xp.astype(same, c.dtype) / m[:, None]
    # a float32 matmul may run at reduced precision on an accelerator
    exact = c.dtype == xp.float64
    mean = xp.matmul(member, c) if exact else sum(member[:, j, None] * c[None, j, :] for j in range(n))
    return c - mean, m / (m - 1)


_SINGLETON = (
    "{name}: a stratum of one response carries no information on the variance. Give every prompt two or more "
    "responses (in one micro-batch, if accumulating), or ask for strata='batch'"
)
