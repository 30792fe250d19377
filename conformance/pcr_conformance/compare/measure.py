"""Adapters held against the reference and against each other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

import pcr_core
from pcr_conformance.adapter import Adapter, Resolved, seen
from pcr_conformance.cases import Case
from pcr_conformance.compare.problems import problem
from pcr_conformance.compare.reference import Reference, evaluate, update_error
from pcr_conformance.rounding import unit_roundoff

RULE = pcr_core.PCR()
_SUMS = {
    "plasticity_sq": "p2",
    "stability_sq": "s2",
    "dot": "c",
    "plasticity_var": "vp",
    "stability_var": "vs",
    "covariance": "vps",
}
QUANTITIES = (*_SUMS, "alpha", "stability weight", "update")


@dataclass(frozen=True)
class Row:
    """One adapter on one problem.

    Attributes:
        errors: by quantity: sums relative to the reference (products of two vectors to the product of their norms),
            alpha and the stability weight relative to it, the update in norm.
        ulps: the same in units of the last place, of the accumulator for sums and weights, of the dtype for the update.
        order: the same between the coordinates as given and reversed: what the order of summation does.
        repeatable: whether a second run gave the same bits.
        seconds: of the faster of two runs, conversion from NumPy included.
        offered: whether the adapter takes the dtype; if not, nothing else is there.
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
            drawn = problem(regime, size, seed)
            for dtype in dtypes:
                yield from _on_one_problem(adapters, drawn, dtype, progress)


def _on_one_problem(
    adapters: Sequence[Adapter], drawn: Case, dtype: str, progress: Callable[[str], None]
) -> Iterator[Row | Agreement]:
    size, regime = sum(drawn.sizes), drawn.regime
    case: Case | None = None
    reference: Reference | None = None
    results: dict[str, Resolved] = {}
    for adapter in adapters:
        progress(f"{adapter.name}, {dtype}, {size:.0e}, {regime}")
        if dtype not in adapter.dtypes:
            yield Row(adapter.name, dtype, size, regime, offered=False)
            continue
        if case is None or reference is None:
            case = drawn.with_(
                plasticity=seen(adapter, drawn.plasticity, dtype), stability=seen(adapter, drawn.stability, dtype)
            )
            reference = evaluate(case, RULE)
        results[adapter.name], row = _measure(adapter, case, reference, dtype)
        yield row
    if case is None or reference is None:
        return
    for one, other in combinations(results, 2):
        a, b = results[one], results[other]
        sums = {name: _off(_value(a, name), _value(b, name), _scale(reference, name)) for name in QUANTITIES[:-1]}
        norm = float(np.linalg.norm(b.update)) or 1.0
        sums["update"] = float(np.linalg.norm(a.update - b.update)) / norm
        yield Agreement(one, other, dtype, size, regime, sums)


def _measure(adapter: Adapter, case: Case, reference: Reference, dtype: str) -> tuple[Resolved, Row]:
    began = time.perf_counter()
    first = adapter.resolve(case, RULE, dtype)
    middle = time.perf_counter()
    second = adapter.resolve(case, RULE, dtype)
    seconds = min(middle - began, time.perf_counter() - middle)
    backwards = adapter.resolve(
        case.with_(plasticity=case.plasticity[:, ::-1].copy(), stability=case.stability[:, ::-1].copy()), RULE, dtype
    )
    names = QUANTITIES[:-1]
    errors = {name: _off(_value(first, name), _exact(reference, name), _scale(reference, name)) for name in names}
    errors["update"] = update_error(case, reference, first.update)
    order = {name: _off(_value(first, name), _value(backwards, name), _scale(reference, name)) for name in names}
    norm = float(np.linalg.norm(first.update)) or 1.0
    order["update"] = float(np.linalg.norm(first.update - backwards.update[::-1])) / norm
    wide = 2 * unit_roundoff(adapter.accumulator)
    ulps = {name: error / (2 * unit_roundoff(dtype) if name == "update" else wide) for name, error in errors.items()}
    repeatable = np.array_equal(first.update, second.update, equal_nan=True) and all(
        _value(first, name) == _value(second, name) for name in names
    )
    row = Row(adapter.name, dtype, sum(case.sizes), case.regime, True, errors, ulps, order, repeatable, seconds)
    return first, row


def _value(resolved: Resolved, name: str) -> float:
    record: Any = resolved.statistics if name in _SUMS else resolved.weights
    return float(np.asarray(getattr(record, "stability" if name == "stability weight" else name))[0])


def _exact(reference: Reference, name: str) -> float:
    if name in _SUMS:
        return reference.sums[_SUMS[name]]
    return float(reference.pair.b if name == "stability weight" else reference.pair.alpha or 0)


def _scale(reference: Reference, name: str) -> float:
    return reference.scales[_SUMS[name]] if name in _SUMS else abs(_exact(reference, name))


def _off(got: float, exact: float, scale: float) -> float:
    """|got - exact| / scale; infinite where `got` is not finite."""
    if not math.isfinite(got):
        return math.inf
    return abs(got - exact) / (scale or 1.0)
