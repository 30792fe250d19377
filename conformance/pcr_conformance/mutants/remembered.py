"""Wrong calls: inputs are overwritten, results change later, or a call depends on those before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pcr_conformance.adapter import Resolved
from pcr_conformance.cases import Case, ObjectiveCase
from pcr_conformance.mutants.wrong import Mutant, Stats, Wrong
from pcr_core import Objective, Rule

_ALONE, _KEPT = "inputs_are_left_alone", "calls_do_not_remember"
Kept = dict[Any, Any]


class _Calls(Wrong):
    """Hooks around each call, with a memory."""

    def __init__(
        self,
        *,
        sums: Callable[[Any, Case, Kept], Any] = lambda found, case, kept: found,
        resolved: Callable[[Resolved, Case, Rule, Kept], Resolved] = lambda found, case, rule, kept: found,
        batch: Callable[[Any, ObjectiveCase, Kept], Any] = lambda found, case, kept: found,
        decided: Callable[[Any, Stats, Kept], Any] = lambda found, stats, kept: found,
    ) -> None:
        super().__init__("calls", "none", lambda: None)
        self.hooks = (sums, resolved, batch, decided)
        self.kept: Kept = {}

    def statistics(self, case: Case, dtype: str) -> Stats:
        stats: Stats = self.hooks[0](super().statistics(case, dtype), case, self.kept)
        return stats

    def resolve(self, case: Case, rule: Rule, dtype: str) -> Resolved:
        return self.hooks[1](super().resolve(case, rule, dtype), case, rule, self.kept)

    def objective(self, case: ObjectiveCase, dtype: str) -> Objective[Any]:
        found: Objective[Any] = self.hooks[2](super().objective(case, dtype), case, self.kept)
        return found

    def weights(self, statistics: Stats, rule: Rule) -> Any:
        return self.hooks[3](super().weights(statistics, rule), statistics, self.kept)


def _mutant(name: str, law: str, **hooks: Any) -> Mutant:
    return Mutant(name, law, "whole", lambda: _Calls(**hooks))


def _centres(found: Any, case: Case, kept: Kept) -> Any:
    case.plasticity[:] -= case.plasticity.mean(0)
    return found


def _sorts(found: Any, case: Case, kept: Kept) -> Any:
    case.group_ids.sort()
    return found


def _scales(found: Resolved, case: Case, rule: Rule, kept: Kept) -> Resolved:
    case.stability[:] *= 0.5
    return found


def _fills(found: Any, case: ObjectiveCase, kept: Kept) -> Any:
    np.nan_to_num(case.logp, copy=False)
    return found


def _clamps(found: Any, stats: Any, kept: Kept) -> Any:
    np.minimum(stats.plasticity_var, stats.plasticity_sq, out=stats.plasticity_var)
    return found


def _one_buffer(found: Resolved, case: Case, rule: Rule, kept: Kept) -> Resolved:
    buffer = kept.setdefault(found.update.shape, np.empty_like(found.update))
    buffer[:] = found.update
    return replace(found, update=buffer)


def _first_by(key: Callable[[Case], Any]) -> Callable[[Any, Case, Kept], Any]:
    return lambda found, case, kept: kept.setdefault(key(case), found)


def _running(found: Any, case: Case, kept: Kept) -> Any:
    before = kept.get(len(case.sizes), found.plasticity_var)
    kept[len(case.sizes)] = v = 0.9 * before + 0.1 * found.plasticity_var
    return replace(found, plasticity_var=v)


def _first_rule(found: Resolved, case: Case, rule: Rule, kept: Kept) -> Resolved:
    first = kept.setdefault(("rule", len(case.group_ids)), rule)
    return replace(found, weights=replace(found.weights, stability=first(found.statistics).stability))


def _sticky(found: Resolved, case: Case, rule: Rule, kept: Kept) -> Resolved:
    kept["broken"] = broken = kept.get("broken", False) | bool(np.isnan(found.update).any())
    return replace(found, weights=replace(found.weights, finite=found.weights.finite & (not broken)))


def _same_array(found: Resolved, case: Case, rule: Rule, kept: Kept) -> Resolved:
    """Kept by the array's identity; the array is kept too, so that no other takes its place."""
    return kept.setdefault((id(case.plasticity), id(case.stability), rule), (found, case))[0]  # type: ignore[no-any-return]


def _first_batch(found: Any, case: ObjectiveCase, kept: Kept) -> Any:
    count = kept.setdefault("tokens", case.mask.sum())
    return replace(found, kl=found.kl * case.mask.sum() / max(count, 1))


REMEMBERED: tuple[Mutant, ...] = (
    _mutant("contributions centred in place", _ALONE, sums=_centres),
    _mutant("ids sorted in place", _ALONE, sums=_sorts),
    _mutant("stability scaled in place", _ALONE, resolved=_scales),
    _mutant("masked entries filled in place", _ALONE, batch=_fills),
    _mutant("statistics clamped in place", _ALONE, decided=_clamps),
    _mutant("one buffer for all updates", _ALONE, resolved=_one_buffer),
    _mutant("statistics kept by shape", _KEPT, sums=_first_by(lambda c: (c.plasticity.shape, c.sizes))),
    _mutant("statistics kept by ids", _KEPT, sums=_first_by(lambda c: (c.plasticity.shape, c.group_ids.tobytes()))),
    _mutant("statistics kept by contributions", _KEPT, sums=_first_by(lambda c: (c.sizes, c.plasticity.tobytes()))),
    _mutant("update kept by array", _KEPT, resolved=_same_array),
    _mutant("running mean of the variance", _KEPT, sums=_running),
    _mutant("first rule for all", _KEPT, resolved=_first_rule),
    _mutant("a failure is never forgotten", _KEPT, resolved=_sticky),
    _mutant("tokens of the first batch", _KEPT, batch=_first_batch),
)
