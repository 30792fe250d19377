"""The soft projection: from the geometry and the noise of two gradients to two numbers per block (math.md section 4).

Where the streams conflict, plasticity's component along stability keeps the fraction 1 - alpha, the posterior mean of
the movement along that line. The update is then a P + b S with a = 1 and b = 1 + min(alpha |P.S|/|S|^2, max_boost): PCR
is an adaptive KL coefficient per block, beta_eff = b beta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, Literal

from pcr_core._erfc import erfc
from pcr_core._namespace import ArrayT, common_namespace, require_floating, require_shape
from pcr_core.statistics import BlockStatistics, require_noise

AlphaKind = Literal["variance", "snr"]
Gate = Literal["sign", "probability"]
Update = Literal["anchored", "literal"]
Conflict = Literal["raw", "debiased"]


@dataclass(frozen=True)
class Weights(Generic[ArrayT]):
    """The update is `plasticity * P + stability * S` in each block; the rest reports why. Shapes (blocks,).

    Attributes:
        plasticity: a.
        stability: b; with beta folded into S, the block's effective KL coefficient is b beta.
        alpha: fraction of the conflicting component that is removed, before the gate and the cap; in [0, 1].
        cosine: cos(P, S); 0 where either vanishes.
        conflict: boolean, whether the rule saw a conflict.
        conflict_probability: P(c < 0) when c = P.S is as noisy as the variances say; None where they are not known.
        removed: |removed part of P| / |P|: of a projection |b' S|/|P|, b' the addition to S's own weight; of MGDA,
            which lets a P through, 1 - a. With a prior, P is the posterior mean.
        plasticity_nsr: noise-to-signal ratio v_p/|P|^2; infinite for pure noise, None where v_p was not measured.
        stability_nsr: v_s/|S|^2.
        finite: boolean, whether all statistics were finite, and of a resolved update whether it is, in its dtype. Where
            statistics are not, a and b are NaN in rules that use them.
    """

    plasticity: ArrayT
    stability: ArrayT
    alpha: ArrayT
    cosine: ArrayT
    conflict: ArrayT
    conflict_probability: ArrayT | None
    removed: ArrayT
    plasticity_nsr: ArrayT | None
    stability_nsr: ArrayT | None
    finite: ArrayT


NOISE = ("plasticity_var", "stability_var", "covariance")


def check_statistics(stats: BlockStatistics[Any]) -> Any:
    """The namespace of valid statistics; TypeError or ValueError naming the field otherwise."""
    named = {name: getattr(stats, name) for name in BlockStatistics.__dataclass_fields__}
    absent = [name for name in NOISE if named[name] is None]
    if absent and len(absent) < len(NOISE):
        raise ValueError(f"statistics: {absent[0]} is None and others of {NOISE} are not; give all of them or none")
    named = {name: value for name, value in named.items() if name not in absent}
    xp = common_namespace(**named)
    require_floating(xp, **named)
    require_shape((None,), "one number a block", plasticity_sq=stats.plasticity_sq)
    require_shape(tuple(stats.plasticity_sq.shape), "one number a block", **named)
    return xp


def ratio(xp: Any, numerator: Any, denominator: Any, empty: float = 0.0) -> Any:
    """numerator/denominator, and `empty` where the denominator is 0; safe to differentiate."""
    void = denominator == 0
    quotient = numerator / xp.where(void, xp.ones_like(denominator), denominator)
    return xp.where(void, xp.zeros_like(quotient) + empty, quotient)


def one_absent(stats: BlockStatistics[Any]) -> Any:
    """Where P or S is zero: there is nothing to resolve, and the update is the plain sum."""
    return (stats.plasticity_sq == 0) | (stats.stability_sq == 0)


def variance_alpha(stats: BlockStatistics[ArrayT]) -> ArrayT:
    """V_p/(V_p + V_s), the paper's (Proposition 4.1); 1/2 where both are 0."""
    xp = check_statistics(stats)
    vp: Any
    vp, vs, _ = require_noise(stats, "alpha='variance'")
    alpha: ArrayT = ratio(xp, vp, vp + vs, empty=0.5)
    return alpha


def snr_alpha(stats: BlockStatistics[ArrayT]) -> ArrayT:
    """q_s/(q_p + q_s) with signal-to-noise ratios q = |.|^2/v: free of the streams' scales; 0/0 is 1/2."""
    xp = check_statistics(stats)
    p2: Any = stats.plasticity_sq
    s2: Any = stats.stability_sq
    vp: Any
    vs: Any
    vp, vs, _ = require_noise(stats, "alpha='snr'")
    # products of fractions: |S|^2 v_p itself can leave float32
    stability = ratio(xp, s2, p2 + s2) * ratio(xp, vp, vp + vs)
    plasticity = ratio(xp, p2, p2 + s2) * ratio(xp, vs, vp + vs)
    alpha: ArrayT = ratio(xp, stability, plasticity + stability, empty=0.5)
    return alpha


def conflict_probability(stats: BlockStatistics[ArrayT], c: ArrayT) -> ArrayT:
    """P(c' < 0) for c' ~ N(c, (v_p |S|^2 + v_s |P|^2 + v_p v_s)/d); a step at 0 where nothing is uncertain."""
    xp = check_statistics(stats)
    noise = require_noise(stats, "the probability of a conflict")
    # standard deviation by parts, each the square root of a product taken factor by factor, so that none overflows
    d = xp.sqrt(stats.size)
    p, s = (_root(xp, sq) / d for sq in (stats.plasticity_sq, stats.stability_sq))
    up, us = (_root(xp, v) for v in noise[:2])
    parts = xp.stack((up * s, us * p, up * us / d))
    scale = xp.max(parts, axis=0)
    noisy = scale > 0
    one = xp.ones_like(scale)
    safe = xp.where(noisy, scale, one)
    deviation = safe * xp.sqrt(xp.where(noisy, xp.sum((parts / safe) ** 2, axis=0), one))
    value: Any = c
    certain = xp.astype(value < 0, value.dtype)
    soft = 0.5 * erfc(xp, value / deviation / math.sqrt(2))
    probability: ArrayT = xp.where(xp.isnan(scale), scale, xp.where(noisy, soft, certain))
    return probability


def _root(xp: Any, x: Any) -> Any:
    """sqrt with derivative 0 at 0 in place of infinity."""
    positive = x > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, x, xp.ones_like(x))), x * 0)


def soft_projection(
    stats: BlockStatistics[ArrayT],
    *,
    alpha: AlphaKind | float = "variance",
    max_boost: float = math.inf,
    gate: Gate = "sign",
    update: Update = "anchored",
    conflict: Conflict = "raw",
) -> Weights[ArrayT]:
    """Weights of two posterior means p and s, given their squares, product and posterior variances (as traces).

    Args:
        stats: of the posterior means; with a flat prior those of the totals.
        alpha: "variance", "snr", or a number in [0, 1].
        max_boost: kappa, the largest addition to b.
        gate: "sign" acts where c < 0; "probability" weighs alpha by P(c < 0).
        update: "anchored" u = p' + s, or "literal" u = p'.
        conflict: "raw" c = p.s, or "debiased" c - v_ps, free of the noise the two streams share.

    Example:
        >>> import numpy as np
        >>> one = lambda x: np.asarray([x])
        >>> stats = BlockStatistics(one(4.0), one(1.0), one(-1.0), one(3.0), one(1.0), one(0.0), one(2.0))
        >>> w = soft_projection(stats)
        >>> float(w.alpha[0]), float(w.plasticity[0]), float(w.stability[0])
        (0.75, 1.0, 1.75)
    """
    xp = check_statistics(stats)
    s2: Any = stats.stability_sq
    dot: Any = stats.dot
    c = dot - require_noise(stats, "conflict='debiased'")[2] if conflict == "debiased" else dot
    if alpha == "variance":
        fraction = variance_alpha(stats)
    elif alpha == "snr":
        fraction = snr_alpha(stats)
    else:
        fraction = xp.zeros_like(s2) + alpha
    probability: Any = conflict_probability(stats, c) if stats.has_noise or gate == "probability" else None
    # of totals that cancel to nothing, noise that both streams share is left: no conflict
    opposed = (c < 0) & ~one_absent(stats)
    gated = fraction * (probability if gate == "probability" else xp.astype(opposed, dot.dtype))
    against = xp.where(opposed, -c, xp.zeros_like(c))
    boost = xp.minimum(gated * ratio(xp, against, s2), xp.full_like(s2, max_boost))
    anchor = 1.0 if update == "anchored" else 0.0
    return report(
        xp,
        stats,
        plasticity=xp.ones_like(s2),
        stability=anchor + boost,
        alpha=fraction,
        conflict=opposed,
        probability=probability,
        removed=boost * ratio(xp, _root(xp, s2), _root(xp, stats.plasticity_sq)),
    )


def report(
    xp: Any,
    stats: BlockStatistics[ArrayT],
    *,
    plasticity: Any,
    stability: Any,
    alpha: Any,
    conflict: Any = None,
    probability: Any = None,
    removed: Any = None,
    needs_statistics: bool = True,
) -> Weights[ArrayT]:
    """Weights with the diagnostics that every rule reports; non-finite statistics make a and b NaN."""
    p2: Any = stats.plasticity_sq
    s2: Any = stats.stability_sq
    dot: Any = stats.dot
    sums = [p2, s2, dot, *(getattr(stats, name) for name in NOISE if stats.has_noise)]
    finite = xp.all(xp.isfinite(xp.stack(sums)), axis=0)  # a sum of them could overflow
    if needs_statistics:
        nan = xp.full_like(p2, math.nan)
        plasticity, stability = xp.where(finite, plasticity, nan), xp.where(finite, stability, nan)
    cosine = ratio(xp, ratio(xp, dot, _root(xp, p2)), _root(xp, s2))
    return Weights(
        plasticity=plasticity,
        stability=stability,
        alpha=alpha,
        cosine=xp.clip(cosine, -1.0, 1.0),
        conflict=dot < 0 if conflict is None else conflict,
        conflict_probability=conflict_probability(stats, dot)
        if probability is None and stats.has_noise
        else probability,
        removed=xp.zeros_like(p2) if removed is None else removed,
        plasticity_nsr=_noise_to_signal(xp, stats.plasticity_var, p2),
        stability_nsr=_noise_to_signal(xp, stats.stability_var, s2),
        finite=finite,
    )


def _noise_to_signal(xp: Any, v: Any, sq: Any) -> Any:
    if v is None:
        return None
    return xp.where((sq == 0) & (v != 0), v + math.inf, ratio(xp, v, sq))  # a NaN stays one
