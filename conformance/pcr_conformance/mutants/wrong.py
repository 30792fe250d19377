"""The adapter that wrong implementations are made of: NumPy in stages, one of which is replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import pcr_core as pcr
from pcr_conformance.adapter import Resolved
from pcr_conformance.cases import Case, ObjectiveCase
from pcr_conformance.dense import DenseAdapter
from pcr_core import BlockStatistics, Objective, Rule, Weights

Stats = BlockStatistics[Any]
Decision = Weights[Any]


class Wrong(DenseAdapter):
    """NumPy in three stages, one of which is replaced."""

    def __init__(self, name: str, stage: str, fault: Callable[..., Any]) -> None:
        self.name, self.stage, self.fault = name, stage, fault
        if stage in ("compile", "sharded", "in place"):
            self.plain = DenseAdapter()
            self.capabilities = frozenset({stage.replace(" ", "_")})
        if stage == "autodiff":
            self.capabilities = frozenset({"objective", "grad"})
        if "bfloat16" in name:
            self.dtypes = ("float64", "float32", "bfloat16")

    def from_numpy(self, x: Any, dtype: str) -> Any:
        return bfloat16(np.asarray(x)) if dtype == "bfloat16" else super().from_numpy(x, dtype)

    def statistics(self, case: Case, dtype: str) -> Stats:
        case = case.with_(plasticity=self._cast(case.plasticity, dtype), stability=self._cast(case.stability, dtype))
        with np.errstate(all="ignore"):
            stats: Stats = self.fault(case) if self.stage == "statistics" else honest(case)
            return stats

    def weights(self, statistics: Stats, rule: Rule) -> Decision:
        with np.errstate(all="ignore"):
            decided: Decision = self.fault(statistics, rule) if self.stage == "weights" else rule(statistics)
            return decided

    def resolve(self, case: Case, rule: Rule, dtype: str) -> Resolved:
        stats = self.statistics(case, dtype)
        weights = self.weights(stats, rule)
        p, s = self._cast(case.plasticity, dtype), self._cast(case.stability, dtype)
        fact = False
        combine = self.fault if self.stage in ("combine", "compile", "sharded", "in place") else combined
        with np.errstate(all="ignore"):
            update = combine(weights, p, s, case.sizes)
            if isinstance(update, tuple):
                update, fact = update
            if self.stage != "combine" or update.dtype == np.float64:
                update = self.from_numpy(update, dtype)
        if self.stage != "judgement":
            written = [bool(np.isfinite(update[b]).all()) for b in case.blocks()]
            weights = replace(weights, finite=weights.finite & np.asarray(written))
        return Resolved(update.astype(np.float64), weights, stats, str(update.dtype), "cpu", fact, fact)

    def objective(self, case: ObjectiveCase, dtype: str) -> Objective[Any]:
        with np.errstate(all="ignore"):
            if self.stage == "objective":
                faulty: Objective[Any] = self.fault(lambda c: super(Wrong, self).objective(c, dtype), case)
                return faulty
            return super().objective(case, dtype)

    def autodiff(self, case: ObjectiveCase, dtype: str) -> tuple[Any, Any]:
        derivatives: tuple[Any, Any] = self.fault(self.objective(case, dtype))
        return derivatives

    def _cast(self, x: Any, dtype: str) -> Any:
        with np.errstate(all="ignore"):
            return np.asarray(self.from_numpy(x, dtype)).astype(np.float64)


def bfloat16(x: Any) -> Any:
    """The nearest bfloat16, as float32, of finite numbers."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return nearest.view(np.float32)


def honest(case: Case, **changes: Any) -> Stats:
    case = case.with_(**changes)
    stats: Stats = pcr.contribution_statistics(
        case.plasticity,
        case.stability,
        group_ids=case.group_ids,
        stability_group_ids=case.stability_group_ids,
        sizes=case.sizes,
        strata=case.strata,
    )
    return stats


def combined(w: Decision, p: Any, s: Any, sizes: tuple[int, ...]) -> Any:
    return np.repeat(w.plasticity, sizes) * p.sum(0) + np.repeat(w.stability, sizes) * s.sum(0)


@dataclass(frozen=True)
class Mutant:
    """One of them: the law that has to notice, the stage that is wrong, and how."""

    name: str
    law: str
    stage: str
    fault: Callable[..., Any]

    def adapter(self) -> Wrong:
        if self.stage == "whole":
            made: Wrong = self.fault()
            return made
        return Wrong(self.name, self.stage, self.fault)
