"""Adapters held against the reference and against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from pcr_conformance.adapter import Adapter
from pcr_conformance.cases import Case, ObjectiveCase
from pcr_conformance.compare.problems import TOKEN_REGIMES, problem, tokens
from pcr_conformance.compare.quantities import VECTORS, Outcome, Problem, posed, refused
from pcr_conformance.rounding import unit_roundoff


@dataclass(frozen=True)
class Row:
    """One adapter on one problem.

    Attributes:
        errors: by quantity: sums relative to the reference (products of two vectors to the product of their norms),
            alpha and the stability weight relative to it, update and cotangents in norm.
        ulps: the same in units of the last place: of the accumulator for sums and weights, of the dtype for vectors.
        order: the same between the coordinates as given and reversed: what the order of summation does.
        repeatable: whether a second run gave the same bits.
        seconds: of the faster of two runs, conversion from NumPy included.
        software: what the adapter computes with, its version, and the name of an accelerator.
        device: where its arrays lie.
        digest: of all bits of the outcome; equal where two outcomes are the same.
        offered: whether the adapter takes the dtype and the kind of problem; if not, nothing else is there.
    """

    adapter: str
    dtype: str
    size: int
    regime: str
    offered: bool = True
    errors: dict[str, float] | None = None
    ulps: dict[str, float] | None = None
    order: dict[str, float] | None = None
    repeatable: bool | None = None
    seconds: float | None = None
    software: str = ""
    device: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Agreement:
    """The largest difference between two adapters on one problem, by quantity, measured as errors are."""

    one: str
    other: str
    dtype: str
    size: int
    regime: str
    differences: dict[str, float]


def compare(
    adapters: Sequence[Adapter],
    dtypes: Sequence[str],
    sizes: Sequence[int],
    regimes: Sequence[str],
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Row | Agreement]:
    """A Row for each adapter, dtype, size and regime, and an Agreement for each two adapters that take the dtype.

    `progress` is told what comes next, once for each Row.
    """
    for regime in regimes:
        for size in sizes:
            drawn = (tokens if regime in TOKEN_REGIMES else problem)(regime, size, seed)
            for dtype in dtypes:
                yield from _on_one_problem(adapters, drawn, size, dtype, progress)


def _on_one_problem(
    adapters: Sequence[Adapter],
    drawn: Case | ObjectiveCase,
    size: int,
    dtype: str,
    progress: Callable[[str], None],
) -> Iterator[Row | Agreement]:
    regime = drawn.regime
    asked: Problem | None = None
    outcomes: dict[str, Outcome] = {}
    for name, adapter in zip(labels(adapters), adapters):
        progress(f"{name}, {dtype}, {size:.0e}, {regime}")
        if refused(adapter, regime, dtype):
            yield Row(name, dtype, size, regime, offered=False)
            continue
        asked = asked or posed(adapter, drawn, dtype)
        outcomes[name], row = _measure(name, adapter, asked, dtype, size, regime)
        yield row
    if asked is not None:
        for one, other in combinations(outcomes, 2):
            differences = asked.differences(outcomes[one], outcomes[other])
            yield Agreement(one, other, dtype, size, regime, differences)


def labels(adapters: Sequence[Adapter]) -> list[str]:
    """Names, with the device where two adapters share one."""
    names = [adapter.name for adapter in adapters]
    return [f"{a.name} on {a.device}" if names.count(a.name) > 1 else a.name for a in adapters]


def _measure(name: str, adapter: Adapter, asked: Problem, dtype: str, size: int, regime: str) -> tuple[Outcome, Row]:
    began = time.perf_counter()
    first = asked.run(adapter)
    middle = time.perf_counter()
    second = asked.run(adapter)
    seconds = min(middle - began, time.perf_counter() - middle)
    repeatable = first.same_bits(second)
    errors = asked.errors(first)
    order = asked.differences(asked.run(adapter, backwards=True), first)
    # an ulp at 1 is twice the unit roundoff
    units = {name: 2 * unit_roundoff(dtype if name in VECTORS else adapter.accumulator) for name in errors}
    ulps = {name: error / units[name] for name, error in errors.items()}
    return first, Row(
        name,
        dtype,
        size,
        regime,
        True,
        errors,
        ulps,
        order,
        repeatable,
        seconds,
        getattr(adapter, "software", ""),
        adapter.device,
        first.digest(),
    )
