"""Numbers against exact arithmetic, in three stages, each judged on what the implementation itself fed into it.

Statistics from contributions, weights from those statistics, update from those weights: no stage inherits another's
rounding, so each is held to a few roundings even where the whole problem is badly conditioned.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

import pcr_core
from pcr_conformance import enclosure, grid, oracle
from pcr_conformance.adapter import Adapter, arithmetic
from pcr_conformance.cases import Case
from pcr_conformance.interval import Interval
from pcr_conformance.laws.checks import as_seen, close, enclosed
from pcr_conformance.rounding import Arithmetic
from pcr_conformance.tolerances import combination_bound, errors
from pcr_core import BlockStatistics, Rule

_STATS = tuple(f.name for f in fields(BlockStatistics))


def statistics_are_exact(adapter: Adapter, case: Case, dtype: str) -> None:
    """Every sum is that of section 2, accumulated in the wide dtype whatever the input's."""
    case = as_seen(adapter, case, dtype)
    _judge_statistics("statistics", adapter.statistics(case, dtype), oracle.statistics(case), case, arithmetic(adapter))


def long_sums_stay_accurate(adapter: Adapter, case: Case, dtype: str) -> None:
    """Sums of thousands of terms lose no more than the declared order of summation does when roundings are random.

    The bound that always holds grows with the number of additions; this one with its square root, and a sum fails it
    by chance less than once in 2^40. The case lies on a grid, where exact sums are sums of integers.
    """
    likely = Arithmetic(adapter.accumulator, adapter.summation, likely=True)
    law = f"long sums, {adapter.summation.kind} in {adapter.accumulator}"
    _judge_statistics(law, adapter.statistics(case, dtype), grid.statistics(case), case, likely)


def float64_keeps_its_digits(adapter: Adapter, case: Case, dtype: str) -> None:
    """float64 in is float64 through: no sum, weight or update passes through anything narrower."""
    case = as_seen(adapter, case, dtype)
    assert adapter.accumulator == "float64", f"float64: sums are declared to be formed in {adapter.accumulator}"
    res = adapter.resolve(case, pcr_core.GRPO(), dtype)
    _judge_statistics("float64", res.statistics, oracle.statistics(case), case, arithmetic(adapter))
    for i, block in enumerate(case.blocks()):
        _judge_update("float64", res.update, case, dtype, block, (1.0, 1.0), arithmetic(adapter), i)


def bfloat16_is_widened_first(adapter: Adapter, case: Case, dtype: str) -> None:
    """Law 10: long sums of bfloat16 are those of the wide accumulator, and only the update is rounded, once."""
    long_sums_stay_accurate(adapter, case, dtype)
    update = adapter.resolve(case, pcr_core.GRPO(), dtype).update
    plain = case.plasticity.sum(0) + case.stability.sum(0)  # exact, on the grid
    close("law 10 (bfloat16)", "update", update, plain, combination_bound(case, 1.0, 1.0, arithmetic(adapter), dtype))


def weights_are_exact(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """a, b, alpha, conflict and its probability follow from the statistics by the formulas of sections 3 to 5."""
    case = as_seen(adapter, case, dtype)
    res = adapter.resolve(case, rule, dtype)
    for i, stats in enumerate(exact_statistics(res.statistics)):
        pair = oracle.weights(rule, stats)
        given = enclosure.around(stats, arithmetic(adapter))
        may = enclosure.weights(rule, given)
        law = f"weights of {rule}, block {i}"
        w = res.weights
        enclosed(law, "plasticity", w.plasticity[i], float(pair.a), may.a)
        enclosed(law, "stability", w.stability[i], float(pair.b), may.b)
        if pair.alpha is not None and may.alpha is not None:
            enclosed(law, "alpha", w.alpha[i], float(pair.alpha), may.alpha)
        if pair.conflict is not None and may.c is not None and not may.c.lo < 0 <= may.c.hi:
            assert bool(w.conflict[i]) == pair.conflict, f"{law}: conflict is {w.conflict[i]}, c = {float(stats.c)}"
        if rule in (pcr_core.GRPO(), pcr_core.PCR(alpha="variance")):
            chance = float(oracle.conflict_probability(stats, stats.c))
            within = enclosure.conflict_probability(given, given.c)
            found: Any = w.conflict_probability
            enclosed(law, "conflict_probability", found[i], chance, within)
        assert w.finite[i], f"{law}: flagged as not finite"
        enclosed(law, "cosine", w.cosine[i], _cosine(stats), _enclosed_cosine(given))


def update_is_the_combination(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """The update is a P + b S in every block, rounded once to the input's dtype."""
    case = as_seen(adapter, case, dtype)
    res = adapter.resolve(case, rule, dtype)
    for i, block in enumerate(case.blocks()):
        pair = (float(res.weights.plasticity[i]), float(res.weights.stability[i]))
        _judge_update(f"update of {rule}", res.update, case, dtype, block, pair, arithmetic(adapter), i)


def exact_statistics(stats: BlockStatistics[Any]) -> list[oracle.Stats]:
    """The implementation's statistics, taken as exact numbers."""
    columns = [oracle.exact(getattr(stats, name)) for name in _STATS]
    return [oracle.Stats(p2, s2, c, vp, vs, vps, int(d)) for p2, s2, c, vp, vs, vps, d in zip(*columns)]


def _judge_statistics(
    law: str, got: BlockStatistics[Any], expected: list[oracle.Stats], case: Case, sums: Arithmetic
) -> None:
    allowed = errors(case, sums)
    for name, field in zip(_STATS, enclosure.FIELDS):
        numbers, bounds = [float(getattr(s, field)) for s in expected], [getattr(e, field) for e in allowed]
        close(law, name, getattr(got, name), numbers, bounds)
    close(law, "size", got.size, case.sizes, 0)
    for name in ("plasticity_var", "stability_var"):
        assert (getattr(got, name) >= 0).all(), f"{law}: {name} is negative: {getattr(got, name)}"


def _judge_update(
    law: str, update: Any, case: Case, dtype: str, block: slice, pair: tuple[float, float], sums: Arithmetic, i: int
) -> None:
    a, b = oracle.exact(pair)
    part = case.with_block(block)
    big_p, big_s = (oracle.total([oracle.exact(row) for row in x]) for x in (part.plasticity, part.stability))
    expected = np.asarray([float(a * p + b * s) for p, s in zip(big_p, big_s)])
    allowed = combination_bound(part, *pair, sums, dtype)
    close(f"{law}, block {i}", "update", update[block], expected, allowed)


def _cosine(stats: oracle.Stats) -> float:
    size = float(stats.p2) ** 0.5 * float(stats.s2) ** 0.5
    return max(-1.0, min(1.0, float(stats.c) / size)) if size else 0.0


def _enclosed_cosine(stats: enclosure.Enclosed) -> Interval:
    return (stats.c / stats.p2.root() / stats.s2.root()).clipped(-1.0, 1.0)
