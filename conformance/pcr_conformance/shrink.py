"""From a case on which a law fails to a smaller one on which it still does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np

from pcr_conformance.cases import Case, ObjectiveCase, group_slots
from pcr_core import BlockStatistics

_SECONDS = 5.0


def shrunk(arguments: dict[str, Any], fails: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The arguments with parts taken away for as long as the law fails; a few seconds at most."""
    until = time.perf_counter() + _SECONDS
    smaller = True
    while smaller:
        smaller = False
        for candidate in _candidates(arguments):
            if time.perf_counter() > until:
                return arguments
            if fails(candidate):
                arguments, smaller = candidate, True
                break
    return arguments


def _candidates(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, Case):
            yield from (arguments | {name: case} for case in _cases(value))
        elif isinstance(value, ObjectiveCase):
            yield from (arguments | {name: case} for case in _batches(value))
        elif isinstance(value, BlockStatistics) and len(value.size) > 1:
            yield from (arguments | {name: _taken(value, i)} for i in range(len(value.size)))


def _cases(case: Case) -> Iterator[Case]:
    blocks = case.blocks()
    if len(blocks) > 1:
        yield from (case.with_block(block) for block in blocks)
    if len(blocks) == 1 and case.sizes[0] > 1:
        yield from (case.with_block(slice(j, j + 1)) for j in range(case.sizes[0]))
    if case.stability_group_ids is None:
        for slots in group_slots(case.group_ids):
            fewest = 1 if case.strata == "batch" else 2
            for gone in (slots, *(slots[k : k + 1] for k in range(len(slots) if len(slots) > fewest else 0))):
                kept = np.setdiff1d(np.arange(len(case.group_ids)), gone)
                if len(kept) >= 2:
                    yield case.with_(
                        plasticity=case.plasticity[kept], stability=case.stability[kept], group_ids=case.group_ids[kept]
                    )
    for digits in (0, 1):
        for name in ("plasticity", "stability"):
            x = getattr(case, name)
            with np.errstate(all="ignore"):
                rounded = np.round(x, digits)
            if not np.array_equal(rounded, x, equal_nan=True):
                yield case.with_(**{name: rounded})


def _batches(case: ObjectiveCase) -> Iterator[ObjectiveCase]:
    n, length = case.logp.shape
    for kept in [np.delete(np.arange(n), i) for i in range(n if n > 1 else 0)]:
        yield replace(case, advantages=case.advantages[kept], **{f: getattr(case, f)[kept] for f in _TOKENS})
    for kept in [np.delete(np.arange(length), j) for j in range(length if length > 1 else 0)]:
        yield replace(case, **{f: getattr(case, f)[:, kept] for f in _TOKENS})


_TOKENS = ("logp", "logp_old", "logp_ref", "mask")


def _taken(statistics: BlockStatistics[Any], i: int) -> BlockStatistics[Any]:
    return BlockStatistics(*(getattr(statistics, f.name)[i : i + 1] for f in fields(statistics)))
