"""Every number of every record is that of exact arithmetic, but for the roundings that it cannot do without."""

from __future__ import annotations

from typing import Any

import pcr_core
from pcr_conformance import grid, oracle
from pcr_conformance.adapter import Adapter, arithmetic, seen
from pcr_conformance.cases import Case
from pcr_conformance.laws.checks import as_seen, close
from pcr_conformance.laws.judging import STATISTICS, judge_resolved, judge_statistics, judge_update, judge_weights
from pcr_conformance.rounding import Arithmetic
from pcr_conformance.tolerances import combination_bound
from pcr_core import BlockStatistics, Rule


def statistics_are_exact(adapter: Adapter, case: Case, dtype: str) -> None:
    """Every sum is that of section 2, accumulated in the wide dtype whatever the input's."""
    case = as_seen(adapter, case, dtype)
    law = f"statistics, strata by {case.strata}"
    judge_statistics(law, adapter.statistics(case, dtype), oracle.statistics(case), case, arithmetic(adapter))


def long_sums_stay_accurate(adapter: Adapter, case: Case, dtype: str, power: int = 0) -> None:
    """Sums of thousands of terms lose no more than the declared order of summation does when roundings are random.

    The bound that always holds grows with the number of additions; this one with its square root, and a sum fails it
    by chance less than once in 2^40. The case lies on a grid, where exact sums are sums of integers,
    in units of a power of two: far from the ends of the dtype's range, or near enough that squares are just inside.
    """
    likely = Arithmetic(adapter.accumulator, adapter.summation, likely=True)
    law = f"long sums, {adapter.summation.kind} in {adapter.accumulator}"
    judge_statistics(law, adapter.statistics(case, dtype), grid.statistics(case, power), case, likely)


def float64_keeps_its_digits(adapter: Adapter, case: Case, dtype: str) -> None:
    """float64 in is float64 through: no sum, weight or update passes through anything narrower."""
    case = as_seen(adapter, case, dtype)
    assert adapter.accumulator == "float64", f"float64: sums are declared to be formed in {adapter.accumulator}"
    rule = pcr_core.GRPO()
    judge_resolved("float64", adapter, case, dtype, rule, adapter.resolve(case, rule, dtype))


def bfloat16_is_widened_first(adapter: Adapter, case: Case, dtype: str) -> None:
    """Law 10: long sums of bfloat16 are those of the wide accumulator, and only the update is rounded, once."""
    long_sums_stay_accurate(adapter, case, dtype)
    update = adapter.resolve(case, pcr_core.GRPO(), dtype).update
    plain = case.plasticity.sum(0) + case.stability.sum(0)  # exact, on the grid
    close("law 10 (bfloat16)", "update", update, plain, combination_bound(case, 1.0, 1.0, arithmetic(adapter), dtype))


def weights_are_exact(adapter: Adapter, statistics: BlockStatistics[Any], rule: Rule, extreme: bool) -> None:
    """Every field of the weights follows from the statistics by the formulas of sections 3 to 5, in any units.

    A block each for conflicts, ties, what is absent, what is certain, and noise that is above the signal.
    """
    statistics = BlockStatistics(*(seen(adapter, getattr(statistics, f), adapter.accumulator) for f in STATISTICS))
    got = adapter.weights(statistics, rule)
    judge_weights(f"weights of {rule}", got, statistics, rule, arithmetic(adapter), any_units=extreme)


def update_is_the_combination(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """The update is a P + b S in every block, rounded once to the input's dtype."""
    case = as_seen(adapter, case, dtype)
    res = adapter.resolve(case, rule, dtype)
    judge_update(f"update of {rule}", res, case, dtype, arithmetic(adapter))


def what_is_resolved_is_reported(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """Statistics and weights that come with an update are its own: the first of the case, the second of the first."""
    case = as_seen(adapter, case, dtype)
    res, sums = adapter.resolve(case, rule, dtype), arithmetic(adapter)
    law = f"what is reported with the update of {rule}"
    judge_statistics(law, res.statistics, oracle.statistics(case), case, sums)
    judge_weights(law, res.weights, res.statistics, rule, sums, flagged=False)
