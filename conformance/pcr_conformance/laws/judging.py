"""Numbers against exact arithmetic, in three stages, each judged on what the implementation itself fed into it.

Statistics from contributions, weights from those statistics, update from those weights: no stage inherits another's
rounding, so each is held to a few roundings even where the whole problem is badly conditioned.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from pcr_conformance import enclosure, oracle, records
from pcr_conformance.adapter import Adapter, Resolved, arithmetic
from pcr_conformance.cases import Case
from pcr_conformance.laws.checks import close, enclosed
from pcr_conformance.rounding import Arithmetic, significand_bits
from pcr_conformance.tolerances import combination_bound, errors
from pcr_core import BlockStatistics, Rule, Weights

STATISTICS = tuple(f.name for f in fields(BlockStatistics))
_TRUTHS = ("conflict", "finite")


def judge_resolved(law: str, adapter: Adapter, case: Case, dtype: str, rule: Rule, res: Resolved) -> None:
    """All of it: statistics, weights and update."""
    sums = arithmetic(adapter)
    judge_statistics(law, res.statistics, oracle.statistics(case), case, sums)
    judge_weights(law, res.weights, res.statistics, rule, sums)
    judge_update(law, res, case, dtype, sums)


def judge_record(law: str, record: Any, blocks: int) -> None:
    """One number a block in every field: float64, and booleans where it is a question."""
    for f in fields(record):
        x = getattr(record, f.name)
        wanted = "bool" if f.name in _TRUTHS else "float64"
        assert isinstance(x, np.ndarray), f"{law}: {f.name} is {type(x).__name__}, expected an array of NumPy"
        assert str(x.dtype) == wanted, f"{law}: {f.name} has dtype {x.dtype}, expected {wanted}"
        assert x.shape == (blocks,), f"{law}: {f.name} has shape {x.shape}, expected ({blocks},)"


def judge_statistics(
    law: str, got: BlockStatistics[Any], expected: list[oracle.Stats], case: Case, sums: Arithmetic
) -> None:
    judge_record(law, got, len(case.sizes))
    allowed = errors(case, sums)
    for name, field in zip(STATISTICS, enclosure.FIELDS):
        numbers, bounds = [float(getattr(s, field)) for s in expected], [getattr(e, field) for e in allowed]
        close(law, name, getattr(got, name), numbers, bounds)
    close(law, "size", got.size, case.sizes, 0)
    for name in ("plasticity_var", "stability_var"):
        assert (getattr(got, name) >= 0).all(), f"{law}: {name} is negative: {getattr(got, name)}"


def judge_weights(
    law: str,
    got: Weights[Any],
    statistics: BlockStatistics[Any],
    rule: Rule,
    sums: Arithmetic,
    *,
    flagged: bool = True,
    any_units: bool = False,
) -> None:
    """Every field, in every block; `flagged` whether the update is known to be finite."""
    judge_record(law, got, len(statistics.size))
    for i, stats in enumerate(exact_statistics(statistics)):
        expected = records.expected(rule, records.in_units(stats) if any_units else stats, sums)
        for name, (exact, may) in expected.numbers.items():
            enclosed(f"{law}, block {i}", name, getattr(got, name)[i], exact, may)
        if expected.conflict is not None:
            seen = bool(got.conflict[i])
            assert seen == expected.conflict, f"{law}, block {i}: conflict is {seen}, c = {float(stats.c)}"
        assert got.finite[i] or not flagged, f"{law}, block {i}: flagged as not finite"


def judge_update(law: str, res: Resolved, case: Case, dtype: str, sums: Arithmetic) -> None:
    """a P + b S of each block with the a and b that are reported, rounded once to the input's dtype.

    What is beyond the dtype's range comes out as an infinity, and is flagged.
    """
    assert res.update.shape == (sum(case.sizes),), f"{law}: the update has shape {res.update.shape}"
    largest = (2 - 2.0 ** (1 - significand_bits(dtype))) * 2.0 ** _EXPONENTS[dtype]
    for i, block in enumerate(case.blocks()):
        pair = (float(res.weights.plasticity[i]), float(res.weights.stability[i]))
        a, b = oracle.exact(pair)
        part = case.with_block(block)
        big_p, big_s = (oracle.total([oracle.exact(row) for row in x]) for x in (part.plasticity, part.stability))
        expected = np.asarray([float(a * p + b * s) for p, s in zip(big_p, big_s)])
        allowed = combination_bound(part, *pair, sums, dtype)
        got = res.update[block]
        beyond = np.isinf(got) & (np.abs(expected) + allowed >= largest) & (np.sign(got) == np.sign(expected))
        close(f"{law}, block {i}", "update", np.where(beyond, expected, got), expected, allowed)
        finite = bool(np.isfinite(got).all())
        assert bool(res.weights.finite[i]) == finite, f"{law}, block {i}: finite is {not finite} of {got}"


_EXPONENTS = {"float64": 1023, "float32": 127, "bfloat16": 127, "float16": 15}


def exact_statistics(stats: BlockStatistics[Any]) -> list[oracle.Stats]:
    """The implementation's statistics, taken as exact numbers."""
    columns = [oracle.exact(getattr(stats, name)) for name in STATISTICS]
    return [oracle.Stats(p2, s2, c, vp, vs, vps, int(d)) for p2, s2, c, vp, vs, vps, d in zip(*columns)]
