"""How far a correct implementation may be off: rounding, carried through the conditioning of each case.

A fixed relative tolerance is either loose where sums cancel or wrong where they do. Here every bound starts from the
size of what was added, not of what came out.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from pcr_conformance import oracle
from pcr_conformance.cases import Case, Floats, group_slots

_FIELDS = ("p2", "s2", "c", "vp", "vs", "vps")


@dataclass(frozen=True)
class Errors:
    """Bounds on the absolute error of one block: the totals (as norms) and each of the statistics."""

    total_p: float
    total_s: float
    p2: float
    s2: float
    c: float
    vp: float
    vs: float
    vps: float


def errors(case: Case, eps: float) -> list[Errors]:
    """Bounds for sums formed with spacing `eps`, in any order."""
    out = []
    for block in case.blocks():
        p, s = case.plasticity[:, block], case.stability[:, block]
        unit = eps * (len(p) + len(s) + p.shape[1] + 4)
        big_p, big_s = _norm(p.sum(0)), _norm(s.sum(0))
        dp, ds = unit * _norm(p, 1), unit * _norm(s, 1)
        # what is left of each response once the mean of its stratum is taken off, and the error of that subtraction
        cp, cs = _norm(_centred(case, p, case.group_ids)), _norm(_centred(case, s, _stability_ids(case)))
        ep, es = unit * _norm(p), unit * _norm(s)
        bessel = 2.0
        out.append(
            Errors(
                dp,
                ds,
                2 * big_p * dp + dp * dp + unit * big_p**2,
                2 * big_s * ds + ds * ds + unit * big_s**2,
                big_p * ds + big_s * dp + dp * ds + unit * big_p * big_s,
                bessel * (2 * cp * ep + ep * ep + unit * cp * cp),
                bessel * (2 * cs * es + es * es + unit * cs * cs),
                bessel * (cp * es + cs * ep + ep * es + unit * cp * cs),
            )
        )
    return out


def update_bounds(case: Case, rule: Any, eps: float, output_eps: float) -> list[float]:
    """For each block a bound on the error norm of the update; infinite where the case does not determine it."""
    bounds = []
    for block, stats, error in zip(case.blocks(), oracle.statistics(case), errors(case, eps)):
        big_p, big_s = (_norm(x[:, block].sum(0)) for x in (case.plasticity, case.stability))
        if error.total_s > 1e-3 * big_s > 0 or error.total_p > 1e-3 * big_p > 0:
            bounds.append(math.inf)  # the direction of a total is mostly rounding
            continue
        middle = oracle.weights(rule, stats)
        da = db = 0.0
        for signs in itertools.product((-1, 1), repeat=len(_FIELDS)):
            moved = {f: getattr(stats, f) + sign * Fraction(getattr(error, f)) for f, sign in zip(_FIELDS, signs)}
            for f in ("p2", "s2", "vp", "vs"):
                moved[f] = max(moved[f], Fraction(0))
            corner = oracle.weights(rule, oracle.Stats(d=stats.d, **moved))
            da, db = max(da, abs(float(corner.a - middle.a))), max(db, abs(float(corner.b - middle.b)))
        a, b = abs(float(middle.a)), abs(float(middle.b))
        bounds.append(
            (da + (8 * eps + output_eps) * a) * big_p
            + (db + (8 * eps + output_eps) * b) * big_s
            + (a + da) * error.total_p
            + (b + db) * error.total_s
        )
    return bounds


def _stability_ids(case: Case) -> Any:
    return case.group_ids if case.stability_group_ids is None else case.stability_group_ids


def _centred(case: Case, c: Floats, ids: Any) -> Floats:
    strata = [np.arange(len(c))] if case.strata == "batch" else group_slots(ids)
    out = np.zeros_like(c)
    for slots in strata:
        out[slots] = c[slots] - c[slots].mean(0)
    return out


def _norm(x: Floats, by_row: int = 0) -> float:
    """Euclidean norm of all entries; `by_row` = 1: the sum of the rows' norms."""
    return float(np.sqrt((x * x).sum(1)).sum()) if by_row else float(np.sqrt((x * x).sum()))
