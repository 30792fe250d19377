"""What every field of a `Weights` has to hold, given the statistics: its exact value, and where rounding may take it.

Fields that never enter the update are what people read: they are judged like the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pcr_core
from pcr_conformance import enclosure, oracle
from pcr_conformance.interval import Interval
from pcr_conformance.oracle import Stats
from pcr_conformance.rounding import Arithmetic

_LARGEST = {"float64": 1.7e308, "float32": 3.4e38}


@dataclass(frozen=True)
class Expected:
    """Of one block: the exact value and the interval of each number, and the conflict, None where rounding decides."""

    numbers: dict[str, tuple[float, Interval]]
    conflict: bool | None


def expected(rule: Any, stats: Stats, arithmetic: Arithmetic) -> Expected:
    """All fields of the weights but `finite`."""
    given = enclosure.around(stats, arithmetic)
    pair, may = oracle.weights(rule, stats), enclosure.weights(rule, given)
    one = Interval(1.0, 1.0, arithmetic)
    zero = Interval(0.0, 0.0, arithmetic)
    means, c, within = stats, stats.c, given
    c_within = given.c
    if isinstance(rule, pcr_core.PCR):
        means, within = oracle.posterior(rule, stats)[2], enclosure.posterior(rule, given)[2]
        c, c_within = means.c, within.c
        if rule.conflict == "debiased":
            c, c_within = means.c - means.vps, within.c - within.vps
    alpha, alpha_within = pair.alpha, may.alpha
    if alpha is None or alpha_within is None:  # PCGrad removes all of it, a sum nothing
        projects = isinstance(rule, pcr_core.PCGrad)
        alpha, alpha_within = Fraction(projects), one if projects else zero
    judged = may.c if may.c is not None else c_within
    decided = not judged.lo < 0 <= judged.hi
    removed = _removed(rule, stats, pair, means), _removed_within(rule, may, given, within, zero)
    return Expected(
        {
            "plasticity": (float(pair.a), may.a),
            "stability": (float(pair.b), may.b),
            "alpha": (float(alpha), alpha_within),
            "cosine": (_cosine(stats), (given.c / given.p2.root() / given.s2.root()).clipped(-1.0, 1.0)),
            "conflict_probability": (
                float(oracle.conflict_probability(means, c)),
                enclosure.conflict_probability(within, c_within),
            ),
            "removed": removed,
            "plasticity_nsr": _noise_to_signal(stats.vp, stats.p2, given.vp, given.p2, arithmetic),
            "stability_nsr": _noise_to_signal(stats.vs, stats.s2, given.vs, given.s2, arithmetic),
        },
        (c < 0 if pair.conflict is None else pair.conflict) if decided else None,
    )


def in_units(stats: Stats) -> Stats:
    """The same gradients in other units, a power of two, so that the largest of the sums is near 1.

    No rule's weights depend on units that both streams share; products of the sums leave a float's range.
    """
    largest = max(stats.p2, stats.s2, stats.vp, stats.vs)
    if not largest:
        return stats
    shift = largest.denominator.bit_length() - largest.numerator.bit_length()
    unit = Fraction(2) ** shift
    return replace(stats, **{name: getattr(stats, name) * unit for name in enclosure.FIELDS})


def _cosine(stats: Stats) -> float:
    size = _root(stats.p2) * _root(stats.s2)
    return max(-1.0, min(1.0, float(stats.c) / size)) if size else 0.0


def _removed(rule: Any, stats: Stats, pair: oracle.Pair, means: Stats) -> float:
    """|b' S|/|P| of a projection, b' the addition to S's own weight; of the shortest vector 1 - a."""
    if isinstance(rule, pcr_core.MGDA):
        return float(1 - pair.a)
    if pair.conflict is None or not means.p2:
        return 0.0
    own = oracle.project(rule, means).b if isinstance(rule, pcr_core.PCR) else pair.b
    boost = own - (0 if getattr(rule, "update", "anchored") == "literal" else 1)
    return float(boost) * _root(means.s2) / _root(means.p2)


def _removed_within(
    rule: Any, may: enclosure.Decision, given: enclosure.Enclosed, means: enclosure.Enclosed, zero: Interval
) -> Interval:
    if isinstance(rule, pcr_core.MGDA):
        return 1 - may.a
    if may.c is None:
        return zero
    boost = enclosure.boost(rule, given, means)
    return boost * (means.s2.root() / means.p2.root())


def _noise_to_signal(
    v: Fraction, sq: Fraction, v_within: Interval, sq_within: Interval, arithmetic: Arithmetic
) -> tuple[float, Interval]:
    if not sq:
        exact = math.inf if v else 0.0
        return exact, Interval(exact, exact, arithmetic)
    quotient = v_within / sq_within
    high = math.inf if quotient.hi > _LARGEST[arithmetic.accumulator] else quotient.hi
    return float(v / sq), Interval(quotient.lo, high, arithmetic)


def _root(x: Fraction) -> float:
    return math.sqrt(float(x))
