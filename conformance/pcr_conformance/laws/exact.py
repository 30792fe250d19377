"""Numbers against exact arithmetic, in three stages, each judged on what the implementation itself fed into it.

Statistics from contributions, weights from those statistics, update from those weights: no stage inherits another's
rounding, so each is held to a few units in the last place even where the whole problem is badly conditioned.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

import pcr_core
from pcr_conformance import oracle
from pcr_conformance.adapter import Adapter, epsilon
from pcr_conformance.cases import Case
from pcr_conformance.laws.checks import as_seen, close
from pcr_conformance.tolerances import errors
from pcr_core import BlockStatistics, Rule

_STATS = tuple(f.name for f in fields(BlockStatistics))
_EXACT = ("p2", "s2", "c", "vp", "vs", "vps")


def statistics_are_exact(adapter: Adapter, case: Case, dtype: str) -> None:
    """Every sum is that of section 2, accumulated in the wide dtype whatever the input's."""
    case = as_seen(adapter, case, dtype)
    got = adapter.statistics(case, dtype)
    expected = oracle.statistics(case)
    allowed = errors(case, epsilon(adapter.accumulator))
    for name, field in zip(_STATS, _EXACT):
        numbers, bounds = [float(getattr(s, field)) for s in expected], [getattr(e, field) for e in allowed]
        close("statistics", name, getattr(got, name), numbers, bounds)
    close("statistics", "size", got.size, case.sizes, 0)
    for name in ("plasticity_var", "stability_var"):
        assert (getattr(got, name) >= 0).all(), f"statistics: {name} is negative: {getattr(got, name)}"


def weights_are_exact(adapter: Adapter, case: Case, dtype: str, rule: Rule, ulps: float = 64) -> None:
    """a, b, alpha, conflict and its probability follow from the statistics by the formulas of sections 3 to 5."""
    case = as_seen(adapter, case, dtype)
    eps = ulps * epsilon(adapter.accumulator)
    res = adapter.resolve(case, rule, dtype)
    for i, stats in enumerate(exact_statistics(res.statistics)):
        pair = oracle.weights(rule, stats)
        law = f"weights of {rule}, block {i}"
        slack = _cancellation(rule, stats)
        w = res.weights
        # MGDA's weights are t and 1 - t: the small one is as exact as 1 is
        least = 1.0 if isinstance(rule, pcr_core.MGDA) else 1e-30
        close(law, "plasticity", w.plasticity[i], float(pair.a), eps * slack * max(abs(float(pair.a)), least))
        close(law, "stability", w.stability[i], float(pair.b), eps * slack * max(abs(float(pair.b)), least))
        if pair.alpha is not None:
            # an alpha below the reach of the dtype may come out as 0
            close(law, "alpha", w.alpha[i], float(pair.alpha), eps * slack * float(pair.alpha) + 1e-30)
        if pair.conflict is not None:
            assert bool(w.conflict[i]) == pair.conflict, f"{law}: conflict is {w.conflict[i]}, c = {float(stats.c)}"
        if rule in (pcr_core.GRPO(), pcr_core.PCR()):
            chance = float(oracle.conflict_probability(stats, stats.c))
            close(law, "conflict_probability", w.conflict_probability[i], chance, eps)
        assert w.finite[i], f"{law}: flagged as not finite"
        close(law, "cosine", w.cosine[i], _cosine(stats), eps)


def update_is_the_combination(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """The update is a P + b S in every block, rounded once to the input's dtype."""
    case = as_seen(adapter, case, dtype)
    res = adapter.resolve(case, rule, dtype)
    eps, out = epsilon(adapter.accumulator), epsilon(dtype)
    big_p, big_s = (oracle.total([oracle.exact(row) for row in x]) for x in (case.plasticity, case.stability))
    size_p, size_s = np.abs(case.plasticity).sum(0), np.abs(case.stability).sum(0)
    for i, block in enumerate(case.blocks()):
        a, b = oracle.exact([res.weights.plasticity[i], res.weights.stability[i]])
        expected = np.asarray([float(a * p + b * s) for p, s in zip(big_p[block], big_s[block])])
        terms = float(abs(a)) * size_p[block] + float(abs(b)) * size_s[block]
        unit = eps * (len(case.plasticity) + 4)
        tiny = {"float16": 2.0**-25}.get(dtype, 0.0)  # halves below this are subnormal
        allowed = unit * terms + out * np.abs(expected) + tiny
        close(f"update of {rule}, block {i}", "update", res.update[block], expected, allowed)


def exact_statistics(stats: BlockStatistics[Any]) -> list[oracle.Stats]:
    """The implementation's statistics, taken as exact numbers."""
    columns = [oracle.exact(getattr(stats, name)) for name in _STATS]
    return [oracle.Stats(p2, s2, c, vp, vs, vps, int(d)) for p2, s2, c, vp, vs, vps, d in zip(*columns)]


def _cancellation(rule: Rule, stats: oracle.Stats) -> float:
    """How much a rule's own subtractions amplify rounding; 1 for those without."""
    if isinstance(rule, pcr_core.MGDA):
        gap = stats.p2 + stats.s2 - 2 * stats.c
        return 1 + float((stats.p2 + stats.s2 + 2 * abs(stats.c)) / gap) if gap else 1.0
    if isinstance(rule, pcr_core.PCR) and rule.gate == "probability":
        c = stats.c - stats.vps if rule.conflict == "debiased" else stats.c
        spread = (stats.vp * stats.s2 + stats.vs * stats.p2 + stats.vp * stats.vs) / stats.d
        return 1 + min(float(c * c / spread), 1e6) if spread else 1.0
    return 1.0


def _cosine(stats: oracle.Stats) -> float:
    size = float(stats.p2) ** 0.5 * float(stats.s2) ** 0.5
    return max(-1.0, min(1.0, float(stats.c) / size)) if size else 0.0
