"""How far a correct implementation may be off, derived from the terms of every sum.

A fixed relative tolerance is either loose where sums cancel or wrong where they do. Here every bound starts from the
sizes of what was added (`rounding`), and goes through the rule by its formula, evaluated on intervals (`enclosure`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcr_conformance import enclosure, oracle
from pcr_conformance.cases import Case, Floats, group_slots
from pcr_conformance.interval import Interval
from pcr_conformance.rounding import Arithmetic, rounding_floor, unit_roundoff

_OWN = 1 + 2.0**-30  # the bounds are themselves computed in float64


@dataclass(frozen=True)
class Errors:
    """Bounds on the absolute errors of one block: of the totals (in norm) and of each of the statistics."""

    total_p: float
    total_s: float
    p2: float
    s2: float
    c: float
    vp: float
    vs: float
    vps: float


@dataclass(frozen=True)
class _Vectors:
    """Vectors with a bound on the error of each entry, and on that of each row in norm."""

    exact: Floats
    entry: Floats
    row: Floats


def errors(case: Case, arithmetic: Arithmetic, inputs: float = 0.0) -> list[Errors]:
    """Bounds for sums of the case's numbers, formed in `arithmetic`.

    Totals are sums of n rows, so gamma_(n-1) of the sizes; products of two vectors are off by what their entries are
    off, and gamma of the depth of the sum. Scatters are sums over rows and coordinates in one, or of rows and then of
    those, of deviations from the means or of squares less those of sums, as declared. `inputs` is the relative error,
    in norm, that the rows come with.
    """
    out = []
    n = max(len(case.plasticity), len(case.stability))
    for block in case.blocks():
        p, s = case.plasticity[:, block], case.stability[:, block]
        depth = arithmetic.summation.depth(p.shape[1]) + 1
        totals = [_total(x, arithmetic, inputs) for x in (p, s)]
        one = np.ones(1)
        squares = [_product(x, y, one, arithmetic.growth(depth), arithmetic.floor) for x, y in _pairs(totals)]
        scattered = _squares if arithmetic.summation.scatter == "squares" else _deviations
        rows = [
            scattered(x, _strata(case, ids, len(x)), arithmetic, inputs)
            for x, ids in ((p, case.group_ids), (s, _stability_ids(case)))
        ]
        # of a sum of rows: the weight of each, and of "squares" the division and the difference
        grown = arithmetic.growth(arithmetic.summation.depth_of_rows(n, p.shape[1]) + 6)
        same = len(p) == len(s) and case.stability_group_ids is None
        scatters = [
            _product(x, y, w, grown, arithmetic.floor)
            for (x, y), w in zip(
                _pairs([vectors for vectors, _ in rows]) if same else [(v, v) for v, _ in rows],
                [rows[0][1], rows[1][1], rows[0][1]],
            )
        ]
        # a covariance of streams from different responses is zero, and not computed
        vp, vs, vps = scatters if same else (*scatters, 0.0)
        p2, s2, c = squares
        out.append(Errors(float(totals[0].row[0]), float(totals[1].row[0]), p2, s2, c, vp, vs, vps))
    return out


def update_bounds(case: Case, rule: Any, arithmetic: Arithmetic, dtype: str, inputs: float = 0.0) -> list[float]:
    """For each block a bound on the error norm of the update; infinite where the case does not determine it."""
    return [bound for bound, _ in outcomes(case, rule, arithmetic, dtype, inputs)]


def outcomes(
    case: Case, rule: Any, arithmetic: Arithmetic, dtype: str, inputs: float = 0.0
) -> list[tuple[float, enclosure.Decision]]:
    """For each block the bound of `update_bounds`, and where the weights may lie."""
    found = []
    for block, stats, error in zip(case.blocks(), oracle.statistics(case), errors(case, arithmetic, inputs)):
        radii = {name: getattr(error, name) for name in enclosure.FIELDS}
        decision = enclosure.weights(rule, enclosure.around(stats, arithmetic, radii))
        exact = oracle.weights(rule, stats)
        da, db = _reach(decision.a, float(exact.a)), _reach(decision.b, float(exact.b))
        a, b = abs(float(exact.a)) + da, abs(float(exact.b)) + db
        big_p, big_s = (_norm(x[:, block].sum(0)) for x in (case.plasticity, case.stability))
        rounded = combination_bound(case.with_block(block), a, b, arithmetic, dtype)
        moved = 0.0
        for change, size, weight, error_of in ((da, big_p, a, error.total_p), (db, big_s, b, error.total_s)):
            moved += (change * size if size else 0.0) + (weight * error_of if error_of else 0.0)
        found.append(((moved + _norm(rounded)) * _OWN, decision))
    return found


def combination_bound(case: Case, a: float, b: float, arithmetic: Arithmetic, dtype: str) -> Floats:
    """For each coordinate what a P + b S is off by, given a and b: n additions, three more, and one to the dtype."""
    p, s = case.plasticity, case.stability
    if not math.isfinite(a) or not math.isfinite(b):
        return np.full(p.shape[1], math.inf)
    grown = arithmetic.growth(max(len(p), len(s)) + 3)
    terms = abs(a) * np.abs(p).sum(0) + abs(b) * np.abs(s).sum(0)
    exact = np.minimum(abs(a) * np.abs(p.sum(0)) + abs(b) * np.abs(s.sum(0)), terms)
    bound: Floats = _OWN * (grown * terms + unit_roundoff(dtype) * (exact + 2 * grown * terms)) + rounding_floor(dtype)
    return bound


def _total(x: Floats, arithmetic: Arithmetic, inputs: float) -> _Vectors:
    sizes = np.abs(x).sum(0)
    entry = arithmetic.growth(len(x) - 1) * sizes + _flushed(len(x), arithmetic)
    row = _norm(entry) + inputs * float(np.sqrt((x * x).sum(1)).sum())
    return _Vectors((np.abs(x.sum(0)) + 2.0**-52 * len(x) * sizes)[None, :], entry[None, :], np.asarray([row]))


def _deviations(x: Floats, strata: list[Any], arithmetic: Arithmetic, inputs: float) -> tuple[_Vectors, Floats]:
    """Deviations from the means of the strata, and the weight m/(m - 1) of each row."""
    size, entry = np.zeros_like(x), np.zeros_like(x)
    row, weight = np.zeros(len(x)), np.zeros(len(x))
    for slots in strata:
        m = len(slots)
        mean_size = np.abs(x[slots]).sum(0) / m
        off = arithmetic.growth(m + 1) * mean_size + _flushed(m + 2, arithmetic)
        size[slots] = np.abs(x[slots] - x[slots].mean(0)) + 2.0**-52 * (m + 1) * (mean_size + np.abs(x[slots]))
        entry[slots] = off + arithmetic.unit * (size[slots] + off)
        norms = np.sqrt((x[slots] * x[slots]).sum(1))
        row[slots] = np.sqrt((entry[slots] * entry[slots]).sum(1)) + inputs * (norms + norms.mean())
        weight[slots] = m / (m - 1)
    return _Vectors(size, entry, row), weight


def _squares(x: Floats, strata: list[Any], arithmetic: Arithmetic, inputs: float) -> tuple[_Vectors, Floats]:
    """The rows and the sums of the strata, which a scatter of squares adds up and takes away; their weights."""
    sums = [_total(x[slots], arithmetic, inputs) for slots in strata]
    norms = inputs * np.sqrt((x * x).sum(1))
    weight = np.zeros(len(x))
    for slots in strata:
        weight[slots] = len(slots) / (len(slots) - 1)
    return _Vectors(
        np.concatenate([np.abs(x), *(v.exact for v in sums)]),
        np.concatenate([np.full_like(x, _flushed(1, arithmetic)), *(v.entry for v in sums)]),
        np.concatenate([norms + _flushed(1, arithmetic) * x.shape[1], *(v.row for v in sums)]),
    ), np.concatenate([weight, [1 / (len(slots) - 1) for slots in strata]])


def _flushed(operations: int, arithmetic: Arithmetic) -> float:
    """What operations lose of an entry where numbers below the smallest normal one become zero, inputs as well."""
    return operations * arithmetic.floor


def _product(x: _Vectors, y: _Vectors, weight: Floats, grown: float, floor: float) -> float:
    """What sum_i w_i x_i.y_i is off by: errors of the entries, of the rows beyond those, and of the sum."""
    entries = x.exact * y.entry + x.entry * y.exact + x.entry * y.entry
    summed = (x.exact + x.entry) * (y.exact + y.entry)
    # `row` holds the entries' part as well, so an error of the inputs is bounded by norms alone
    beyond = [np.maximum(v.row - np.sqrt((v.entry * v.entry).sum(1)), 0) for v in (x, y)]
    long = [np.sqrt((v.exact * v.exact).sum(1)) + v.row for v in (x, y)]
    rows = entries.sum(1) + beyond[0] * long[1] + long[0] * beyond[1]
    rows = rows + grown * (summed.sum(1) + beyond[0] * long[1] + long[0] * beyond[1])
    return float((weight * rows).sum()) * _OWN + 2 * floor * x.exact.size


def _pairs(two: list[_Vectors]) -> list[tuple[_Vectors, _Vectors]]:
    return [(two[0], two[0]), (two[1], two[1]), (two[0], two[1])]


def _reach(interval: Interval, value: float) -> float:
    return max(interval.hi - value, value - interval.lo, 0.0)


def _strata(case: Case, ids: Any, n: int) -> list[Any]:
    return [np.arange(n)] if case.strata == "batch" else group_slots(ids)


def _stability_ids(case: Case) -> Any:
    return case.group_ids if case.stability_group_ids is None else case.stability_group_ids


def _norm(x: Floats) -> float:
    return float(np.sqrt((x * x).sum()))
