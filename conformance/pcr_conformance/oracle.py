"""Exact reference in rational numbers, written from the formulas and sharing no arithmetic with `pcr_core`.

Floats are rationals, so statistics, posterior, alpha, weights and update are exact here. Only the conflict probability
needs a transcendental function: mpmath gives it to 60 digits. Slow, and meant for a few hundred numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import mpmath

import pcr_core
from pcr_conformance.cases import Case, group_slots

DIGITS = 60
Vector = list[Fraction]


@dataclass(frozen=True)
class Stats:
    """One block: |P|^2, |S|^2, P.S, v_p, v_s, v_ps, d."""

    p2: Fraction
    s2: Fraction
    c: Fraction
    vp: Fraction
    vs: Fraction
    vps: Fraction
    d: int


SUMS = {
    "plasticity_sq": "p2",
    "stability_sq": "s2",
    "dot": "c",
    "plasticity_var": "vp",
    "stability_var": "vs",
    "covariance": "vps",
}
"""Fields of `pcr_core.BlockStatistics`, and their names here."""


class Pair(NamedTuple):
    """What a rule decides for one block: the update is a P + b S. `alpha` is None where the rule has none."""

    a: Fraction
    b: Fraction
    alpha: Fraction | None = None
    conflict: bool | None = None


def exact(x: Any) -> Vector:
    return [Fraction(float(value)) for value in x]


def dot(x: Vector, y: Vector) -> Fraction:
    return sum((a * b for a, b in zip(x, y)), Fraction(0))


def total(rows: Sequence[Vector]) -> Vector:
    return [sum(column, Fraction(0)) for column in zip(*rows)]


def statistics(case: Case) -> list[Stats]:
    """Sums per block, the scatter by its raw formula: sum_q m/(m-1) (sum p_i.s_i - p_q.s_q/m)."""
    p_rows, s_rows = [exact(row) for row in case.plasticity], [exact(row) for row in case.stability]
    shared = case.stability_group_ids is None
    s_ids = case.group_ids if case.stability_group_ids is None else case.stability_group_ids
    out = []
    for block in case.blocks():
        p, s = [row[block] for row in p_rows], [row[block] for row in s_rows]
        big_p, big_s = total(p), total(s)
        out.append(
            Stats(
                dot(big_p, big_p),
                dot(big_s, big_s),
                dot(big_p, big_s),
                _scatter(p, p, _strata(case, case.group_ids)),
                _scatter(s, s, _strata(case, s_ids)),
                _scatter(p, s, _strata(case, case.group_ids)) if shared else Fraction(0),
                block.stop - block.start,
            )
        )
    return out


def _strata(case: Case, ids: Any) -> list[list[int]]:
    if case.strata == "batch":
        return [list(range(len(ids)))]
    return [slots.tolist() for slots in group_slots(ids)]


def _scatter(p: list[Vector], s: list[Vector], strata: list[list[int]]) -> Fraction:
    v = Fraction(0)
    for members in strata:
        m = len(members)
        sums = dot(total([p[i] for i in members]), total([s[i] for i in members]))
        v += Fraction(m, m - 1) * (sum((dot(p[i], s[i]) for i in members), Fraction(0)) - sums / m)
    return v


def weights(rule: Any, stats: Stats) -> Pair:
    """a and b of one block, straight from the table of rules."""
    p2, s2, c = stats.p2, stats.s2, stats.c
    if isinstance(rule, pcr_core.GRPO):
        return Pair(Fraction(1), Fraction(1))
    if isinstance(rule, pcr_core.NoAnchor):
        return Pair(Fraction(1), Fraction(0))
    if isinstance(rule, pcr_core.HardProjection):
        return Pair(Fraction(1), 1 - c / s2 if c < 0 else Fraction(1), Fraction(1), c < 0)
    if isinstance(rule, pcr_core.FixedAlpha):
        alpha = Fraction(rule.alpha)
        return Pair(Fraction(1), 1 - alpha * c / s2 if c < 0 else Fraction(1), alpha, c < 0)
    if isinstance(rule, pcr_core.PCGrad):
        if c < 0:
            return Pair(1 - c / p2, 1 - c / s2, None, True)
        return Pair(Fraction(1), Fraction(1), None, False)
    if isinstance(rule, pcr_core.MGDA):
        if not p2 or not s2:
            return Pair(Fraction(1), Fraction(1))
        gap = p2 + s2 - 2 * c  # |P - S|^2
        t = min(max((s2 - c) / gap, Fraction(0)), Fraction(1)) if gap else Fraction(1, 2)
        return Pair(t, 1 - t)
    if isinstance(rule, pcr_core.PCR):
        return _pcr(rule, stats)
    raise TypeError(f"the oracle does not know {rule!r}")


def _pcr(rule: pcr_core.PCR, stats: Stats) -> Pair:
    gp, gs, means = posterior(rule, stats)
    pair = project(rule, means)
    return pair._replace(a=gp * pair.a, b=gs * pair.b)


def posterior(rule: pcr_core.PCR, stats: Stats) -> tuple[Fraction, Fraction, Stats]:
    """Gains of both streams, and the statistics of the posterior means."""
    gp = gs = Fraction(1)
    if isinstance(rule.prior, pcr_core.ShrinkagePrior):
        gp, gs = shrinkage_gain(stats.p2, stats.vp), shrinkage_gain(stats.s2, stats.vs)
    elif not isinstance(rule.prior, pcr_core.FlatPrior):
        raise TypeError("a temporal prior has a state: use temporal_step, then project")
    means = Stats(
        gp * gp * stats.p2,
        gs * gs * stats.s2,
        gp * gs * stats.c,
        gp * stats.vp,
        gs * stats.vs,
        gp * gs * stats.vps,
        stats.d,
    )
    return gp, gs, means


def project(rule: pcr_core.PCR, means: Stats) -> Pair:
    """The soft projection of two posterior means, with their posterior variances."""
    c = means.c - means.vps if rule.conflict == "debiased" else means.c
    alpha = retention_complement(rule.alpha, means)
    boost = Fraction(0)
    conflict = c < 0 and means.p2 != 0 and means.s2 != 0
    if conflict:
        gate = conflict_probability(means, c) if rule.gate == "probability" else 1
        boost = gate * alpha * -c / means.s2
        if math.isfinite(rule.max_boost):
            boost = min(boost, Fraction(rule.max_boost))
    anchor = 1 if rule.update == "anchored" else 0
    return Pair(Fraction(1), anchor + boost, alpha, conflict)


def retention_complement(kind: Any, stats: Stats) -> Fraction:
    """alpha = 1 - k."""
    if kind == "variance":
        mine, other = stats.vp, stats.vs
    elif kind == "snr":
        mine, other = stats.s2 * stats.vp, stats.p2 * stats.vs
    else:
        return Fraction(kind)
    return mine / (mine + other) if mine + other else Fraction(1, 2)


def conflict_probability(stats: Stats, c: Fraction) -> Fraction:
    """P(x < 0), x ~ N(c, V_p |s|^2 + V_s |p|^2 + d V_p V_s), variances V = v/d per coordinate."""
    vp, vs = stats.vp / stats.d, stats.vs / stats.d
    spread = vp * stats.s2 + vs * stats.p2 + stats.d * vp * vs
    if not spread:
        return Fraction(c < 0)
    with mpmath.workdps(DIGITS):
        deviation = mpmath.sqrt(mpmath.mpf(spread.numerator) / spread.denominator)
        z = mpmath.mpf(c.numerator) / c.denominator / deviation
        if abs(z) > 60:  # less than 1e-780 from a certainty
            return Fraction(z < 0)
        return rational(mpmath.erfc(z / mpmath.sqrt(2)) / 2)


def rational(x: Any) -> Fraction:
    """The number that an mpf holds."""
    sign, mantissa, exponent, _ = x._mpf_
    shift = Fraction(2 ** abs(int(exponent)))
    size = int(mantissa) * (shift if exponent >= 0 else 1 / shift)
    return -size if sign else size


def shrinkage_gain(sq: Fraction, v: Fraction) -> Fraction:
    """tau2/(tau2 + v) with tau2 = max(sq - v, 0)."""
    prior = max(sq - v, Fraction(0))
    return prior / (prior + v) if prior else Fraction(0)


def temporal_step(
    x: Vector, v: Fraction, mean: Vector | None, variance: Fraction | None, discount: float
) -> tuple[Vector, Fraction]:
    """One step of the Kalman filter: posterior mean and variance, from the last ones (None at first)."""
    if mean is None or not variance:  # a stream without noise has not begun
        return x, v
    prior = variance / Fraction(discount)
    gain = prior / (prior + v)
    return [gain * new + (1 - gain) * old for new, old in zip(x, mean)], gain * v


def resolve(case: Case, rule: Any) -> tuple[Vector, list[Pair], list[Stats]]:
    """The update, and how it came about."""
    stats = statistics(case)
    pairs = [weights(rule, block) for block in stats]
    big_p, big_s = total([exact(r) for r in case.plasticity]), total([exact(r) for r in case.stability])
    update: Vector = []
    for block, pair in zip(case.blocks(), pairs):
        update += [pair.a * p + pair.b * s for p, s in zip(big_p[block], big_s[block])]
    return update, pairs, stats
