"""Wrong sums: variances, products, sizes, and the precision they are formed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pcr_conformance.cases import Case
from pcr_conformance.mutants.wrong import Mutant, Stats, honest
from pcr_core import BlockStatistics

_S = "statistics_are_exact"


def _scaled(case: Case, factor: Callable[[Case, Any], Any]) -> Stats:
    """Both variances times a factor."""
    stats = honest(case)
    f = factor(case, stats)
    return replace(stats, plasticity_var=stats.plasticity_var * f, stability_var=stats.stability_var * f)


def _without_bessel(case: Case) -> Stats:
    stats = honest(case)
    out = []
    for x in (case.plasticity, case.stability):
        total = np.zeros(x.shape[1])
        for g in np.unique(case.group_ids):
            rows = x[case.group_ids == g]
            total += ((rows - rows.mean(0)) ** 2).sum(0)
        out.append(np.array([total[block].sum() for block in case.blocks()]))
    return replace(stats, plasticity_var=out[0], stability_var=out[1])


def _narrow(case: Case, dtype: Any) -> Stats:
    return BlockStatistics(*(np.asarray(x, dtype).astype(np.float64) for x in vars(honest(case)).values()))


def _summed_in_float32(case: Case, block: int | None = None) -> Stats:
    """|P|^2, |S|^2 and P.S with float32 sums: of all terms, or of blocks that are then added in float64."""
    p, s = (x.sum(0).astype(np.float32) for x in (case.plasticity, case.stability))
    sums = []
    for x, y in ((p, p), (s, s), (p, s)):
        products = [
            np.add.reduceat(x[b] * y[b], np.arange(0, b.stop - b.start, block or 1 << 30)) for b in case.blocks()
        ]
        sums.append(np.asarray([float(each.astype(np.float64).sum()) for each in products]))
    return replace(honest(case), plasticity_sq=sums[0], stability_sq=sums[1], dot=sums[2])


def _narrowed(case: Case) -> Stats:
    return honest(case, plasticity=_f4(case.plasticity), stability=_f4(case.stability))


def _f4(x: Any) -> Any:
    return x.astype(np.float32).astype(np.float64)


def _hidden(case: Case) -> Stats:
    return honest(case, plasticity=np.nan_to_num(case.plasticity), stability=np.nan_to_num(case.stability))


def _one_pass(case: Case) -> Stats:
    """|c|^2 less the mean's: cancels where responses are nearly identical."""
    variance = []
    for x in (case.plasticity, case.stability):
        v = np.zeros(len(case.sizes))
        for g in np.unique(case.group_ids):
            rows = x[case.group_ids == g]
            m = len(rows)
            for i, b in enumerate(case.blocks()):
                v[i] += m / (m - 1) * ((rows[:, b] ** 2).sum() - (rows[:, b].sum(0) ** 2).sum() / m)
        variance.append(np.maximum(v, 0))
    return replace(honest(case), plasticity_var=variance[0], stability_var=variance[1])


def _dropped(x: Any) -> Any:
    return np.where(np.arange(len(x))[:, None] == 0, 0.0, x)


def _mapped(case: Case, name: str, change: Callable[[Any], Any]) -> Stats:
    stats = honest(case)
    return replace(stats, **{name: change(getattr(stats, name))})


def _averaged(case: Case) -> Stats:
    """Mean over coordinates in place of the sum."""
    stats = honest(case)
    return replace(stats, **{name: x / stats.size for name, x in vars(stats).items() if name != "size"})


def _batch_bessel(case: Case, stats: Stats) -> float:
    n = len(case.group_ids)
    return n / (n - 1)


def _raw_covariance(case: Case) -> Stats:
    stats = honest(case)
    if case.stability_group_ids is not None:
        return stats
    products = case.plasticity * case.stability
    return replace(stats, covariance=np.asarray([products[:, b].sum() for b in case.blocks()]))


def _squares_of_responses(case: Case) -> Stats:
    rows = case.plasticity**2
    return replace(honest(case), plasticity_sq=np.asarray([rows[:, b].sum() for b in case.blocks()]))


SUMS: tuple[Mutant, ...] = (
    Mutant("no Bessel factor", _S, "statistics", _without_bessel),
    Mutant("variance pooled over groups", _S, "statistics", lambda c: honest(c, strata="batch")),
    Mutant(
        "variance of the mean, not of the total",
        _S,
        "statistics",
        lambda c: _scaled(c, lambda c, s: 1 / len(c.group_ids)),
    ),
    Mutant("variance times n", _S, "statistics", lambda c: _scaled(c, lambda c, s: len(c.group_ids))),
    Mutant("variance per coordinate", _S, "statistics", lambda c: _scaled(c, lambda c, s: 1 / s.size)),
    Mutant("float32 accumulation", _S, "statistics", lambda c: _narrow(c, np.float32)),
    Mutant("float16 accumulation", _S, "statistics", lambda c: _narrow(c, np.float16)),
    Mutant("float32 accumulation of bfloat16", "bfloat16_is_widened_first", "statistics", _summed_in_float32),
    Mutant(
        "float32 sums of blocks",
        "long_sums_stay_accurate",
        "statistics",
        lambda c: _summed_in_float32(c, block=1024),
    ),
    Mutant("float64 narrowed to float32", "float64_keeps_its_digits", "statistics", _narrowed),
    Mutant("one-pass variance", _S, "statistics", _one_pass),
    Mutant("non-finite hidden", "non_finite_is_never_hidden", "statistics", _hidden),
    Mutant("first response dropped", _S, "statistics", lambda c: honest(c, plasticity=_dropped(c.plasticity))),
    Mutant("block offsets by one", _S, "statistics", lambda c: honest(c, plasticity=np.roll(c.plasticity, 1, 1))),
    Mutant("group ids taken as sorted", _S, "statistics", lambda c: honest(c, group_ids=np.sort(c.group_ids))),
    Mutant("no covariance", _S, "statistics", lambda c: replace(honest(c), covariance=np.zeros(len(c.sizes)))),
    Mutant("covariance of the wrong sign", _S, "statistics", lambda c: _mapped(c, "covariance", np.negative)),
    Mutant("standard deviation for variance", _S, "statistics", lambda c: _mapped(c, "plasticity_var", np.sqrt)),
    Mutant("norm for squared norm", _S, "statistics", lambda c: _mapped(c, "stability_sq", np.sqrt)),
    Mutant("absolute inner product", _S, "statistics", lambda c: _mapped(c, "dot", np.abs)),
    Mutant("size off by one", "shards_add_up", "statistics", lambda c: _mapped(c, "size", lambda d: d + 1)),
    Mutant("averaged over shards", "shards_add_up", "statistics", lambda c: _averaged(c)),
    Mutant("batch's Bessel for each stratum", "strata_add_up", "statistics", lambda c: _scaled(c, _batch_bessel)),
    Mutant(
        "clamped from below", _S, "statistics", lambda c: _mapped(c, "plasticity_var", lambda v: np.maximum(v, 1e-12))
    ),
    Mutant("covariance clamped at 0", _S, "statistics", lambda c: _mapped(c, "covariance", lambda v: np.maximum(v, 0))),
    Mutant("covariance within the variances' mean", _S, "statistics", lambda c: _mapped(c, "covariance", np.tanh)),
    Mutant("covariance not centred", _S, "statistics", _raw_covariance),
    Mutant(
        "variance of S for both", _S, "statistics", lambda c: replace(honest(c), plasticity_var=honest(c).stability_var)
    ),
    Mutant(
        "squares less their noise",
        _S,
        "statistics",
        lambda c: replace(honest(c), plasticity_sq=honest(c).plasticity_sq - honest(c).plasticity_var),
    ),
    Mutant("blocks' sums added up", _S, "statistics", lambda c: _mapped(c, "dot", np.cumsum)),
    Mutant("size of all coordinates", _S, "statistics", lambda c: _mapped(c, "size", lambda d: 0 * d + d.sum())),
    Mutant("squares of responses", _S, "statistics", _squares_of_responses),
    Mutant(
        "last coordinate left out",
        _S,
        "statistics",
        lambda c: honest(
            c, stability=np.where(np.arange(c.stability.shape[1]) == c.stability.shape[1] - 1, 0.0, c.stability)
        ),
    ),
)
