"""The reference for long vectors, in 80-bit floats: sums to 1e-17 of their terms, weights exact from there on.

`oracle` is exact, and takes a millisecond a number. Here products of float32 are exact, those of float64 rounded to 64
bits, and sums of parts are NumPy's pairwise ones; the tests hold it to the oracle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from pcr_conformance import oracle
from pcr_conformance.cases import Case, Floats, group_slots

_PART = 1 << 18


@dataclass(frozen=True)
class Reference:
    """Of one block: its sums, the sizes that their errors are measured by, and what a rule makes of them."""

    sums: dict[str, float]
    scales: dict[str, float]
    pair: oracle.Pair


def evaluate(case: Case, rule: Any) -> Reference:
    """Raises ValueError where the platform's long double is no wider than float64."""
    if np.finfo(np.longdouble).eps > 2e-19:
        raise ValueError("compare needs 80-bit long doubles, which this platform's NumPy does not have")
    sums = dict.fromkeys(("p2", "s2", "c", "vp", "vs", "vps"), np.longdouble(0))
    groups = group_slots(case.group_ids)
    for p, s in _parts(case):
        big_p, big_s = p.sum(0), s.sum(0)
        for name, a, b in (("p2", big_p, big_p), ("s2", big_s, big_s), ("c", big_p, big_s)):
            sums[name] += np.sum(a * b)
        for rows in groups:
            m = np.longdouble(len(rows))
            # deviations from the group's mean: the same number, without cancellation
            dp, ds = p[rows] - p[rows].sum(0) / m, s[rows] - s[rows].sum(0) / m
            for name, a, b in (("vp", dp, dp), ("vs", ds, ds), ("vps", dp, ds)):
                sums[name] += np.sum(a * b) * m / (m - 1) if m > 1 else 0
    fractions = {name: _fraction(value) for name, value in sums.items()}
    fractions["vp"], fractions["vs"] = max(fractions["vp"], Fraction(0)), max(fractions["vs"], Fraction(0))
    pair = oracle.weights(rule, oracle.Stats(**fractions, d=sum(case.sizes)))
    values = {name: float(value) for name, value in sums.items()}
    scales = values | {
        "c": (values["p2"] * values["s2"]) ** 0.5,
        "vps": (values["vp"] * values["vs"]) ** 0.5,
    }
    return Reference(values, scales, pair)


def update_error(case: Case, reference: Reference, update: Floats) -> float:
    """|update - (a P + b S)| over |a P + b S|."""
    a, b = (np.longdouble(float(x)) for x in (reference.pair.a, reference.pair.b))
    off, size = np.longdouble(0), np.longdouble(0)
    for start, (p, s) in zip(range(0, sum(case.sizes), _PART), _parts(case)):
        exact = a * p.sum(0) + b * s.sum(0)
        off += np.sum((update[start : start + _PART] - exact) ** 2)
        size += np.sum(exact**2)
    return float(np.sqrt(off / size)) if size else float(np.sqrt(off))


def _parts(case: Case) -> Iterator[tuple[Any, Any]]:
    for start in range(0, sum(case.sizes), _PART):
        part = slice(start, start + _PART)
        yield case.plasticity[:, part].astype(np.longdouble), case.stability[:, part].astype(np.longdouble)


def _fraction(x: Any) -> Fraction:
    high = float(x)
    return Fraction(high) + Fraction(float(x - np.longdouble(high)))
