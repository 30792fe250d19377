"""Laws 1 to 4: what the soft projection does to two gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import pcr_core
from pcr_conformance import enclosure
from pcr_conformance.adapter import Adapter, arithmetic
from pcr_conformance.cases import Case, Floats
from pcr_conformance.laws.checks import as_seen, close, same_bits
from pcr_conformance.laws.judging import exact_statistics
from pcr_conformance.tolerances import combination_bound, outcomes, update_bounds
from pcr_core import BlockStatistics, Rule
from pcr_core.statistics import require_noise


def no_conflict_is_the_plain_sum(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """Law 1: without conflict the anchored update is P + S to the last bit, the literal one P."""
    literal = getattr(rule, "update", "anchored") == "literal"
    res = adapter.resolve(case, rule, dtype)
    plain = adapter.resolve(case, pcr_core.NoAnchor() if literal else pcr_core.GRPO(), dtype)
    for i, block in enumerate(case.blocks()):
        if res.statistics.dot[i] >= 0:
            law = f"law 1 (no conflict is the plain sum), {rule}, block {i}"
            same_bits(law, "plasticity weight", res.weights.plasticity[i], 1.0)
            same_bits(law, "stability weight", res.weights.stability[i], 0.0 if literal else 1.0)
            same_bits(law, "update", res.update[block], plain.update[block])


def one_stream_absent_is_the_plain_sum(
    adapter: Adapter, case: Case, dtype: str, rule: Rule, stream: str, cancelling: bool
) -> None:
    """Law 12: where P or S is zero, or adds up to zero, every rule is the plain sum; rules without S keep to P."""
    signs = np.where(np.arange(len(case.plasticity)) % 2 == 0, 1.0, -1.0)
    signs[len(signs) // 2 * 2 :] = 0
    rows = signs[:, None] * _of_few_bits(getattr(case, stream)[:1]) if cancelling else np.zeros_like(case.plasticity)
    case = case.with_(**{stream: rows})
    without = isinstance(rule, pcr_core.NoAnchor) or getattr(rule, "update", "anchored") == "literal"
    res = adapter.resolve(case, rule, dtype)
    plain = adapter.resolve(case, pcr_core.NoAnchor() if without else pcr_core.GRPO(), dtype)
    law = f"law 12 (one stream absent), {rule}, {stream} {'cancels' if cancelling else 'is zero'}"
    same_bits(law, "update", res.update, plain.update)
    same_bits(law, "plasticity weight", res.weights.plasticity, np.ones(len(case.sizes)))
    same_bits(law, "removed", res.weights.removed, np.zeros(len(case.sizes)))


def alpha_is_a_fraction(adapter: Adapter, case: Case, dtype: str, kind: str) -> None:
    """Law 2: alpha lies in [0, 1], grows with V_p, falls with V_s, and swapping the streams gives 1 - alpha."""
    rule = pcr_core.PCR(alpha=kind)  # type: ignore[arg-type]
    stats = adapter.statistics(case, dtype)
    law = f"law 2 (alpha is a fraction), {kind}"
    alpha = adapter.weights(stats, rule).alpha
    assert ((alpha >= 0) & (alpha <= 1)).all(), f"{law}: alpha is {alpha}"
    swapped = replace(
        stats,
        plasticity_sq=stats.stability_sq,
        stability_sq=stats.plasticity_sq,
        plasticity_var=stats.stability_var,
        stability_var=stats.plasticity_var,
    )
    allowed = _alpha_widths(adapter, stats, kind) + _alpha_widths(adapter, swapped, kind)
    close(law, "alpha + alpha of the swapped streams", alpha + adapter.weights(swapped, rule).alpha, 1.0, allowed)
    vp, vs, _ = require_noise(stats, law)
    noisier = adapter.weights(replace(stats, plasticity_var=4 * vp), rule).alpha
    steadier = adapter.weights(replace(stats, stability_var=4 * vs), rule).alpha
    inside = (alpha > 1e-3) & (alpha < 1 - 1e-3) & (vp > 0) & (vs > 0)
    if kind == "snr":
        inside &= (stats.plasticity_sq > 0) & (stats.stability_sq > 0)
    assert ((noisier > alpha) | ~inside).all(), f"{law}: more noise in P took alpha from {alpha} to {noisier}"
    assert ((steadier < alpha) | ~inside).all(), f"{law}: more noise in S took alpha from {alpha} to {steadier}"


def conflict_keeps_its_fraction(adapter: Adapter, case: Case, dtype: str, kind: str | float) -> None:
    """Law 3: in conflict p'.s = (1 - alpha) p.s, and p' differs from p along s alone."""
    case = as_seen(adapter, case, dtype)
    rule = pcr_core.PCR(alpha=kind, max_boost=np.inf, update="literal")  # type: ignore[arg-type]
    res = adapter.resolve(case, rule, dtype)
    for i, (block, (bound, may)) in enumerate(zip(case.blocks(), outcomes(case, rule, arithmetic(adapter), dtype))):
        p, s, u = case.plasticity[:, block].sum(0), case.stability[:, block].sum(0), res.update[block]
        c, size_s = float(p @ s), float(np.linalg.norm(s))
        # judged where rounding leaves no doubt that there is a conflict, and along which direction
        if may.c is None or may.alpha is None or not (may.c.hi < 0 and np.isfinite(bound) and size_s > 0):
            continue
        law = f"law 3 (conflict keeps the fraction 1 - alpha), alpha={kind}, block {i}"
        own = len(p) * 2.0**-52 * float(np.linalg.norm(p) + np.linalg.norm(u)) * size_s  # of this check's products
        along = bound * size_s + own
        kept = (1 - float(res.weights.alpha[i])) * c
        close(law, "p'.s", u @ s, kept, along + (may.alpha.hi - may.alpha.lo) * abs(c))
        assert u @ s >= c - along, f"{law}: p'.s = {u @ s} is more negative than p.s = {c}"
        change = u - p
        across = change - (change @ s) / size_s**2 * s
        close(law, "component of p' - p orthogonal to s", np.linalg.norm(across), 0.0, bound + own / size_s)


def projection_never_lengthens(adapter: Adapter, case: Case, dtype: str, kind: str | float) -> None:
    """Law 4, first half: |p'| <= |p|."""
    case = as_seen(adapter, case, dtype)
    rule = pcr_core.PCR(alpha=kind, max_boost=np.inf, update="literal")  # type: ignore[arg-type]
    update = adapter.resolve(case, rule, dtype).update
    for i, (block, bound) in enumerate(zip(case.blocks(), update_bounds(case, rule, arithmetic(adapter), dtype))):
        size_p = float(np.linalg.norm(case.plasticity[:, block].sum(0)))
        length = float(np.linalg.norm(update[block]))
        longest = size_p * (1 + 2.0**-50) + bound
        assert length <= longest, f"law 4 (|p'| <= |p|), alpha={kind}, block {i}: {length} > {size_p}"


def boost_is_capped(adapter: Adapter, case: Case, dtype: str, max_boost: float, shrink: float = 2.0**-20) -> None:
    """Law 4, second half: b lies in [1, 1 + kappa], so as beta goes to 0 the update goes to P, at a bounded rate."""
    rule = pcr_core.PCR(alpha="variance", max_boost=max_boost)
    law = f"law 4 (b is in [1, 1 + {max_boost}])"
    case = as_seen(adapter, case, dtype)
    weak = as_seen(adapter, case.with_(stability=case.stability * shrink), dtype)
    for c in (case, weak):
        b = adapter.resolve(c, rule, dtype).weights.stability
        assert ((b >= 1) & (b <= 1 + max_boost)).all(), f"{law}: b is {b}"
    update = adapter.resolve(weak, rule, dtype).update
    for i, block in enumerate(case.blocks()):
        p, s = weak.plasticity[:, block].sum(0), weak.stability[:, block].sum(0)
        # a gradient that is 1/shrink weaker moves the update by that much less
        rounded = combination_bound(weak.with_block(block), 1.0, 1 + max_boost, arithmetic(adapter), dtype)
        allowed = (1 + max_boost) * np.linalg.norm(s) * (1 + 2.0**-50) + np.linalg.norm(rounded)
        off = np.linalg.norm(update[block] - p)
        assert off <= allowed, f"{law}, block {i}: |u - P| = {off} with beta times {shrink}, allowed {allowed}"


def _of_few_bits(x: Floats) -> Floats:
    """Rounded to 8 bits, so that sums of many copies are exact in any order and in any dtype."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.round(fraction * 2**8) / 2**8, exponent)


def _alpha_widths(adapter: Adapter, stats: BlockStatistics[Any], kind: str) -> Floats:
    """What rounding leaves open of alpha in each block."""
    found = []
    for block in exact_statistics(stats):
        alpha = enclosure.retention_complement(kind, enclosure.around(block, arithmetic(adapter)))
        found.append(alpha.hi - alpha.lo)
    return np.asarray(found)
