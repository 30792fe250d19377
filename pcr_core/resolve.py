"""The whole method on dense arrays: per-response contributions in, update out.

This is the readable form of what adapters do on models: statistics -> posterior -> projection -> combine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

from pcr_core._namespace import ArrayT, common_namespace, require_floating, require_shape, widest_float
from pcr_core.posterior import TemporalPrior
from pcr_core.projection import Weights
from pcr_core.rules import PCR, Rule, require_rule
from pcr_core.statistics import BlockStatistics, Strata, contribution_statistics

_DEFAULT = PCR()


@dataclass(frozen=True)
class PriorState(Generic[ArrayT]):
    """What TemporalPrior carries to the next step: posterior means (d,) and variances (blocks,) of both streams."""

    plasticity_mean: ArrayT
    stability_mean: ArrayT
    plasticity_var: ArrayT
    stability_var: ArrayT


@dataclass(frozen=True)
class Resolution(Generic[ArrayT]):
    """Result of `resolve`: the update (d,) in the input's dtype, and how it came about.

    `update = weights.plasticity * P + weights.stability * S` per block, with P and S the totals - or, with
    TemporalPrior, the filtered means in `state`. `weights.finite` is false as well where the update left its dtype.
    """

    update: ArrayT
    weights: Weights[ArrayT]
    statistics: BlockStatistics[ArrayT]
    state: PriorState[ArrayT] | None


def resolve(
    plasticity: ArrayT,
    stability: ArrayT,
    *,
    group_ids: ArrayT,
    rule: Rule = _DEFAULT,
    stability_group_ids: ArrayT | None = None,
    sizes: Sequence[int] | None = None,
    strata: Strata = "group",
    state: PriorState[ArrayT] | None = None,
) -> Resolution[ArrayT]:
    """Resolve the conflict of two gradients given as per-response contributions.

    Args:
        plasticity: (n, d) contribution of each response, normalisation included (row i: gradient of i's share).
        stability: (n, d), or (m, d) with `stability_group_ids` when it comes from other responses.
        group_ids: (n,) integer, the prompt of each response. May be traced.
        rule: `PCR()` by default.
        stability_group_ids: (m,) ids of the stability stream's own responses.
        sizes: split of the d coordinates into consecutive blocks; one block by default.
        strata: "group" or "batch", see `contribution_statistics`.
        state: the last step's `Resolution.state`, for `PCR(prior=TemporalPrior())`; None at the first step.

    Returns:
        A Resolution. The update has the inputs' dtype and device; sums are accumulated in the widest float there is.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.

    Example:
        >>> import numpy as np
        >>> p = np.asarray([[1.0, 1.0], [3.0, 1.0]])
        >>> s = np.asarray([[-0.5, 0.0], [-0.5, 0.0]])
        >>> res = resolve(p, s, group_ids=np.asarray([0, 0]))
        >>> res.update  # half of the conflicting component goes, S is added
        array([1., 2.])
        >>> resolve(p, s, group_ids=np.asarray([0, 0]), rule=PCR(alpha="variance")).update  # S is certain: all of it
        array([-1.,  2.])
    """
    xp = common_namespace(plasticity=plasticity, stability=stability, group_ids=group_ids)
    require_rule(rule)
    stats = contribution_statistics(
        plasticity,
        stability,
        group_ids=group_ids,
        stability_group_ids=stability_group_ids,
        sizes=sizes,
        strata=strata,
    )
    p: Any = plasticity
    s: Any = stability
    out, wide = _common_dtype(xp, p, s), widest_float(xp, p)
    p, s = xp.sum(xp.astype(p, wide), axis=0), xp.sum(xp.astype(s, wide), axis=0)
    lengths = (p.shape[0],) if sizes is None else tuple(sizes)
    if isinstance(rule, PCR) and isinstance(rule.prior, TemporalPrior):
        weights, state = _filter(xp, rule, stats, p, s, state, lengths)
        p, s = state.plasticity_mean, state.stability_mean
    elif state is not None:
        raise ValueError("state: only PCR with TemporalPrior keeps state; drop the argument")
    else:
        weights = rule(stats)
    update = _spread(xp, weights.plasticity, lengths) * p + _spread(xp, weights.stability, lengths) * s
    update = xp.astype(update, out)
    broken = _block_sums(xp, xp.astype(~xp.isfinite(update), xp.int32), lengths)  # sums may fit the wide dtype alone
    return Resolution(update, replace(weights, finite=weights.finite & (broken == 0)), stats, state)


def _common_dtype(xp: Any, p: Any, s: Any) -> Any:
    return p.dtype if p.dtype == s.dtype else xp.result_type(p.dtype, s.dtype)


def _filter(
    xp: Any, rule: PCR, stats: BlockStatistics[Any], p: Any, s: Any, state: Any, sizes: tuple[int, ...]
) -> tuple[Weights[Any], PriorState[Any]]:
    if state is None:
        unknown = xp.full_like(stats.plasticity_var, math.inf)
        state = PriorState(xp.zeros_like(p), xp.zeros_like(s), unknown, unknown)
    require_floating(xp, state=state.plasticity_mean)
    require_shape((p.shape[0],), "one number a coordinate", state=state.plasticity_mean)
    post_p, post_s = rule.posteriors(stats, (state.plasticity_var, state.stability_var))
    rp, rs = _spread(xp, post_p.gain, sizes), _spread(xp, post_s.gain, sizes)
    mp = rp * p + (1 - rp) * state.plasticity_mean
    ms = rs * s + (1 - rs) * state.stability_mean
    means = replace(
        stats,
        plasticity_sq=_block_sums(xp, mp * mp, sizes),
        stability_sq=_block_sums(xp, ms * ms, sizes),
        dot=_block_sums(xp, mp * ms, sizes),
        plasticity_var=post_p.variance,
        stability_var=post_s.variance,
    )
    weights = rule.project(means)
    # a step that is not finite is no evidence: its update is NaN, and the filter of that block waits
    ok, wide = weights.finite, _spread(xp, weights.finite, sizes)
    kept = PriorState(
        xp.where(wide, mp, state.plasticity_mean),
        xp.where(wide, ms, state.stability_mean),
        xp.where(ok, post_p.variance, state.plasticity_var),
        xp.where(ok, post_s.variance, state.stability_var),
    )
    return weights, kept


def _spread(xp: Any, per_block: Any, sizes: tuple[int, ...]) -> Any:
    """(blocks,) -> (d,)"""
    return xp.concat([xp.broadcast_to(per_block[i : i + 1], (size,)) for i, size in enumerate(sizes)])


def _block_sums(xp: Any, x: Any, sizes: tuple[int, ...]) -> Any:
    """(d,) -> (blocks,)"""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return xp.stack([xp.sum(x[end - size : end]) for end, size in zip(ends, sizes)])
