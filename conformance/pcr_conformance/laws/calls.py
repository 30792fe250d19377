"""A call reads its arguments and nothing else: it leaves them as they were, and remembers none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np

from pcr_conformance.adapter import Adapter
from pcr_conformance.cases import Case, ObjectiveCase
from pcr_conformance.laws.checks import as_seen, same_bits
from pcr_conformance.laws.judging import judge_record, judge_resolved
from pcr_conformance.laws.objective import judge_objective, objective_as_seen
from pcr_core import PCR, Rule


def inputs_are_left_alone(
    adapter: Adapter, case: Case, dtype: str, rule: Rule, batch: ObjectiveCase | None = None
) -> None:
    """No array that an implementation is given changes, nor do the records that it returned before."""
    case = as_seen(adapter, case, dtype)
    with _unchanged("inputs", case):
        stats = adapter.statistics(case, dtype)
    with _unchanged("inputs", case), _unchanged("statistics", stats):
        weights = adapter.weights(stats, rule)
    with _unchanged("inputs", case), _unchanged("statistics", stats), _unchanged("weights", weights):
        res = adapter.resolve(case, rule, dtype)
    with _unchanged("inputs", case), _unchanged("weights", res.weights), _unchanged("statistics", res.statistics):
        before = np.array(res.update)
        adapter.resolve(case.with_(plasticity=2 * case.plasticity), rule, dtype)
        same_bits("inputs", "the last update", res.update, before)
    if batch is not None:
        batch = objective_as_seen(adapter, batch, dtype)
        with _unchanged("inputs", batch):
            adapter.objective(batch, dtype)


def calls_do_not_remember(
    adapter: Adapter,
    case: Case,
    dtype: str,
    rule: Rule,
    other: Rule,
    seed: int,
    batches: tuple[ObjectiveCase, ObjectiveCase] | None = None,
) -> None:
    """Calls in any order give what each gives alone: nothing is kept of shapes, ids, values, rules or failures.

    The second case has the first one's shapes, and partly its ids, arrays and rule.
    """
    case = as_seen(adapter, case, dtype)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(case.group_ids))
    regrouped = case.with_(group_ids=case.group_ids[order])
    changed = as_seen(adapter, case.with_(plasticity=-2 * case.plasticity[order]), dtype)
    spoilt = np.array(case.plasticity)
    spoilt[0] = np.nan
    calls: list[tuple[Case, Rule]] = [(case, rule), (regrouped, rule), (case, other), (changed, rule), (case, rule)]
    for k, (each, asked) in enumerate(calls):
        res = adapter.resolve(each, asked, dtype)
        judge_resolved(f"call {k + 1} of several, {asked}", adapter, each, dtype, asked, res)
        if k == 2:
            adapter.resolve(case.with_(plasticity=spoilt), rule, dtype)
    held = case.with_(plasticity=np.array(case.plasticity), stability=np.array(case.stability))
    adapter.resolve(held, rule, dtype)
    held.plasticity[:], held.stability[:] = changed.plasticity, changed.stability  # other numbers in the same arrays
    res = adapter.resolve(held, rule, dtype)
    judge_resolved(f"arrays used again, {rule}", adapter, held, dtype, rule, res)
    if batches is not None:
        for batch in (*batches, batches[0]):
            judge_objective("one of several batches", adapter, objective_as_seen(adapter, batch, dtype), dtype)


def records_are_complete(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """Each record holds float64 or booleans, one a block; numbers lie within their limits."""
    case = as_seen(adapter, case, dtype)
    stats, res = adapter.statistics(case, dtype), adapter.resolve(case, rule, dtype)
    blocks, law = len(case.sizes), f"records, {rule}"
    for record in (stats, res.statistics, res.weights, adapter.weights(stats, rule)):
        judge_record(law, record, blocks)
    assert str(np.asarray(res.update).dtype) == "float64", f"{law}: the update has dtype {res.update.dtype}"
    w: Any = res.weights
    for name, low, high in (
        ("alpha", 0, 1),
        ("cosine", -1, 1),
        ("conflict_probability", 0, 1),
        ("removed", 0, np.inf),
        ("plasticity_nsr", 0, np.inf),
        ("stability_nsr", 0, np.inf),
        ("plasticity", 0, np.inf),
        ("stability", 0, 1 + rule.max_boost if isinstance(rule, PCR) else np.inf),
    ):
        x = getattr(w, name)
        assert ((x >= low) & (x <= high)).all(), f"{law}: {name} is {x}, expected within [{low}, {high}]"


@contextmanager
def _unchanged(what: str, record: Any) -> Iterator[None]:
    names = [f.name for f in fields(record) if isinstance(getattr(record, f.name), np.ndarray)]
    copies = {name: np.array(getattr(record, name)) for name in names}
    yield
    for name, copy in copies.items():
        same_bits(f"{what} are left alone", name, getattr(record, name), copy)
