"""The few numbers that are logged of a step, from what a rule decided on all blocks."""

from __future__ import annotations

import math
from typing import Any

from pcr_core.projection import Weights
from pcr_core.statistics import BlockStatistics, require_noise


def summary(weights: Weights[Any], statistics: BlockStatistics[Any], rows: Any, prefix: str) -> dict[str, float]:
    """Of the blocks that `rows` picks out of the float64 arrays of an eager library; of the noise where measured."""
    p2, s2 = float(statistics.plasticity_sq[rows].sum()), float(statistics.stability_sq[rows].sum())
    removed2 = float((weights.removed[rows] ** 2 * statistics.plasticity_sq[rows]).sum())
    conflict = weights.conflict[rows]
    values = {
        "conflict_rate": float(conflict.sum()) / len(conflict),
        "cosine": float(weights.cosine[rows].mean()),
        "alpha": float(weights.alpha[rows].mean()),
        "boost": float(weights.stability[rows].mean()) - 1,
        "removed": math.sqrt(_over(removed2, p2)),
        "plasticity_norm": math.sqrt(p2),
        "stability_norm": math.sqrt(s2),
        "nonfinite_blocks": float((~weights.finite[rows]).sum()),
    }
    if statistics.has_noise:
        vp, vs, shared = (noise[rows] for noise in require_noise(statistics, "a summary"))
        dot = statistics.dot[rows]
        opposed = dot < 0
        values |= {
            "conflict_rate_debiased": float((dot < shared).sum()) / len(conflict),
            "noise_share": _over(float(shared[opposed].sum()), float(dot[opposed].sum())),
            "cosine_debiased": float(debiased_cosine(statistics)[rows].mean()),
            "plasticity_nsr": _over(float(vp.sum()), p2),
            "stability_nsr": _over(float(vs.sum()), s2),
        }
    return {prefix + key: value for key, value in values.items()}


def debiased_cosine(statistics: BlockStatistics[Any]) -> Any:
    """(P.S - v_ps)/(|P| |S|) of each block: its cosine but for noise that both streams share; 0 of nothing."""
    length = statistics.plasticity_sq**0.5 * statistics.stability_sq**0.5
    shared = require_noise(statistics, "the debiased cosine")[2]
    return (statistics.dot - shared) / (length + (length == 0))


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0 else (0.0 if numerator == 0 else math.inf)
