"""Where a rule's weights may lie, given where the statistics may: the table of rules, evaluated on intervals.

`oracle.weights` is the value, this the distance that an implementation may keep from it: first-order sensitivities and
all higher orders, rounding of the formula itself included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pcr_core
from pcr_conformance.interval import Interval
from pcr_conformance.oracle import Stats
from pcr_conformance.rounding import Arithmetic, gamma

FIELDS = ("p2", "s2", "c", "vp", "vs", "vps")


@dataclass(frozen=True)
class Enclosed:
    """Seven statistics of one block, each somewhere in an interval."""

    p2: Interval
    s2: Interval
    c: Interval
    vp: Interval
    vs: Interval
    vps: Interval
    d: int


@dataclass(frozen=True)
class Decision:
    """a and b of one block; `alpha`, `c` (whose sign is the conflict) and its probability where the rule has them."""

    a: Interval
    b: Interval
    alpha: Interval | None = None
    c: Interval | None = None


def around(stats: Stats, arithmetic: Arithmetic, radii: Mapping[str, float] | None = None) -> Enclosed:
    """The statistics, each with an absolute error up to its radius (0 by default)."""
    out = {}
    for name in FIELDS:
        value, radius = getattr(stats, name), 0.0 if radii is None else radii[name]
        low, high = _outward(value, radius)
        out[name] = Interval(max(low, 0.0) if name not in ("c", "vps") else low, high, arithmetic)
    return Enclosed(**out, d=stats.d)


def weights(rule: Any, stats: Enclosed) -> Decision:
    """Every a and b that an implementation may come to."""
    one = Interval(1.0, 1.0, stats.c.arithmetic)
    against = (-stats.c).clipped(0.0, math.inf)
    if isinstance(rule, pcr_core.GRPO):
        return Decision(one, one)
    if isinstance(rule, pcr_core.NoAnchor):
        return Decision(one, one - 1)
    if isinstance(rule, pcr_core.PCGrad):
        return Decision(against / stats.p2 + 1, against / stats.s2 + 1, None, stats.c)
    if isinstance(rule, pcr_core.MGDA):
        if stats.p2.hi == 0 or stats.s2.hi == 0:
            return Decision(one, one)
        if stats.p2 == stats.s2 == stats.c and stats.c.lo == stats.c.hi:  # P = S, in which nothing is rounded
            return Decision(half := Interval(0.5, 0.5, one.arithmetic), half)
        gap = stats.p2 + stats.s2 - stats.c * 2
        undecided = gap.lo <= 0
        t = Interval(0.0, 1.0, one.arithmetic) if undecided else ((stats.s2 - stats.c) / gap).clipped(0.0, 1.0)
        a, b = t, (1 - t).clipped(0.0, 1.0)
        if stats.p2.lo == 0 or stats.s2.lo == 0:  # perhaps the plain sum
            a, b = replace(a, hi=1.0), replace(b, hi=1.0)
        return Decision(a, b)
    rule = _as_pcr(rule)
    gp, gs, means = posterior(rule, stats)
    found = _project(rule, means)
    return found if gp is None or gs is None else replace(found, a=gp * found.a, b=gs * found.b)


def posterior(rule: pcr_core.PCR, stats: Enclosed) -> tuple[Interval | None, Interval | None, Enclosed]:
    """Gains of both streams (None: exactly 1), and the statistics of the posterior means."""
    if isinstance(rule.prior, pcr_core.FlatPrior):
        return None, None, stats
    gp, gs = _gain(stats.p2, stats.vp), _gain(stats.s2, stats.vs)
    means = replace(
        stats,
        p2=gp * gp * stats.p2,
        s2=gs * gs * stats.s2,
        c=gp * gs * stats.c,
        vp=gp * stats.vp,
        vs=gs * stats.vs,
        vps=gp * gs * stats.vps,
    )
    return gp, gs, means


def boost(rule: Any, stats: Enclosed, means: Enclosed) -> Interval:
    """What a projection adds to the stability gradient's own weight, in units of the posterior mean."""
    if isinstance(rule, pcr_core.PCGrad):
        return (-stats.c).clipped(0.0, math.inf) / stats.s2
    rule = _as_pcr(rule)
    return _boost(rule, means, _opposed(rule, means), retention_complement(rule.alpha, means))


def _as_pcr(rule: Any) -> pcr_core.PCR:
    if isinstance(rule, pcr_core.HardProjection):
        return pcr_core.PCR(alpha=1.0, max_boost=math.inf)
    if isinstance(rule, pcr_core.FixedAlpha):
        return pcr_core.PCR(alpha=rule.alpha, max_boost=math.inf)
    if not isinstance(rule, pcr_core.PCR) or isinstance(rule.prior, pcr_core.TemporalPrior):
        raise TypeError(f"no enclosure of {rule!r}")
    return rule


def _project(rule: pcr_core.PCR, means: Enclosed) -> Decision:
    one = Interval(1.0, 1.0, means.c.arithmetic)
    c, alpha = _opposed(rule, means), retention_complement(rule.alpha, means)
    added = _boost(rule, means, c, alpha)
    return Decision(one, added + 1 if rule.update == "anchored" else added, alpha, c)


def _opposed(rule: pcr_core.PCR, means: Enclosed) -> Interval:
    """The inner product in question; not negative where one stream is zero."""
    c = means.c - means.vps if rule.conflict == "debiased" else means.c
    if means.p2.hi == 0 or means.s2.hi == 0:  # nothing to resolve, whatever the noise
        return c.clipped(0.0, 0.0)
    if means.p2.lo == 0 or means.s2.lo == 0:  # perhaps nothing
        return replace(c, hi=max(c.hi, 0.0))
    return c


def _boost(rule: pcr_core.PCR, means: Enclosed, c: Interval, alpha: Interval) -> Interval:
    one = Interval(1.0, 1.0, c.arithmetic)
    noisy = means.c - means.vps if rule.conflict == "debiased" else means.c
    gate = conflict_probability(means, noisy) if rule.gate == "probability" else one
    against = gate * alpha * (-c).clipped(0.0, math.inf) / means.s2
    return against.clipped(0.0, math.inf).least(one * rule.max_boost)


def retention_complement(kind: Any, stats: Enclosed) -> Interval:
    """alpha = 1 - k."""
    if kind == "variance":
        return stats.vp.share(stats.vs)
    if kind == "snr":
        return (stats.s2 * stats.vp).share(stats.p2 * stats.vs)
    return Interval(float(kind), float(kind), stats.c.arithmetic) * 1.0  # a number is rounded on its way in


def conflict_probability(stats: Enclosed, c: Interval) -> Interval:
    """P(x < 0), x ~ N(c, (v_p |s|^2 + v_s |p|^2 + v_p v_s)/d)."""
    spread = (stats.vp * stats.s2 + stats.vs * stats.p2 + stats.vp * stats.vs) / float(stats.d)
    if spread.hi == 0:
        return Interval(float(c.hi < 0), float(c.lo < 0), c.arithmetic)
    if spread.lo == 0:
        return Interval(0.0, 1.0, c.arithmetic)
    return (c / spread.root()).below_zero()


def _gain(sq: Interval, v: Interval) -> Interval:
    """max(1 - v/|.|^2, 0)"""
    return sq if sq.hi == 0 else (1 - v / sq).clipped(0.0, 1.0)


def _outward(value: Fraction, radius: float) -> tuple[float, float]:
    """Floats below value - radius and above value + radius; the value itself where it is a float without error."""
    x = float(value)
    if radius == 0 and Fraction(x) == value:
        return x, x
    own = gamma(4, 2.0**-53) * (abs(x) + radius)
    return x - radius - own, x + radius + own
