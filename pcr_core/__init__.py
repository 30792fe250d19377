"""Probabilistic Conflict Resolution (PCR) for GRPO: the mathematics, on any array-API library.

The data's way: `objective` (losses, cotangents) -> an adapter's pullback -> `statistics` -> `posterior` ->
`projection` / `rules` (weights a, b per block) -> combine, u = a P + b S. `resolve` is all of it on dense arrays.
"""

from pcr_core.baseline import (
    Baseline,
    BaselineSums,
    baseline_sums,
    estimate_baseline,
    update_baseline_sums,
    variance_reduction,
)
from pcr_core.objective import Objective, group_advantages, grpo_objective
from pcr_core.posterior import FlatPrior, Posterior, Prior, ShrinkagePrior, TemporalPrior
from pcr_core.projection import Weights, conflict_probability, snr_alpha, soft_projection, variance_alpha
from pcr_core.resolve import PriorState, Resolution, resolve
from pcr_core.rules import (
    GRPO,
    MGDA,
    PCR,
    PRIORS,
    RULES,
    FixedAlpha,
    HardProjection,
    NoAnchor,
    PCGrad,
    Rule,
    make_rule,
    needs_noise,
)
from pcr_core.statistics import (
    BlockStatistics,
    Scatter,
    contribution_statistics,
    merge,
    stratified_covariance,
    stratified_variance,
)

__version__ = "0.1.0"

__all__ = [
    "GRPO",
    "MGDA",
    "PCR",
    "PRIORS",
    "RULES",
    "Baseline",
    "BaselineSums",
    "BlockStatistics",
    "FixedAlpha",
    "FlatPrior",
    "HardProjection",
    "NoAnchor",
    "Objective",
    "PCGrad",
    "Posterior",
    "Prior",
    "PriorState",
    "Resolution",
    "Rule",
    "Scatter",
    "ShrinkagePrior",
    "TemporalPrior",
    "Weights",
    "baseline_sums",
    "conflict_probability",
    "contribution_statistics",
    "estimate_baseline",
    "group_advantages",
    "grpo_objective",
    "make_rule",
    "merge",
    "needs_noise",
    "resolve",
    "snr_alpha",
    "soft_projection",
    "stratified_covariance",
    "stratified_variance",
    "update_baseline_sums",
    "variance_alpha",
    "variance_reduction",
]
