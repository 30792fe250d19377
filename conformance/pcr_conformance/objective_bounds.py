"""How far losses and cotangents may be off: first-order rounding of their formulas, doubled for all higher orders.

exp of a log-ratio x is off by what x is off by, absolutely; expm1 of a gap g by 1 + |g| times that of g, relatively.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pcr_conformance.cases import Floats, ObjectiveCase
from pcr_conformance.rounding import FUNCTION, gamma, rounding_floor, unit_roundoff

_HIGHER_ORDERS = 2.0


@dataclass(frozen=True)
class Bounds:
    """On the absolute errors of an Objective's fields, shapes as there; and of derivatives by autodiff, (n, T)."""

    plasticity_loss: Floats
    stability_loss: Floats
    plasticity_cotangent: Floats
    stability_cotangent: Floats
    kl: float
    clip_fraction: float
    plasticity_derivative: Floats
    stability_derivative: Floats


def bounds(case: ObjectiveCase, dtype: str) -> Bounds:
    """Half precision is widened to float32, and cotangents are rounded back."""
    u, out = unit_roundoff("float32" if dtype in ("float16", "bfloat16") else dtype), unit_roundoff(dtype)
    n, length = case.logp.shape
    logp, old, ref = (np.where(case.mask, x, 0.0) for x in (case.logp, case.logp_old, case.logp_ref))
    log_ratio, gap = logp - old, ref - logp
    norm = _norms(case)[:, None] * case.mask
    tokens = np.maximum(case.mask.sum(1, keepdims=True), 1)

    off = u * np.abs(log_ratio)
    if case.importance == "sequence":
        off = gamma(length + 2, u) * np.abs(log_ratio).sum(1, keepdims=True) / tokens * np.ones_like(log_ratio)
        log_ratio = log_ratio.sum(1, keepdims=True) / tokens * np.ones_like(log_ratio)
    ratio = np.exp(log_ratio)
    # slope, normalisation (two divisions), the sum over tokens of a sequence's, and the clip's own bounds
    relative = off + (FUNCTION + length + 8) * u
    slope = np.abs(case.advantages)[:, None] * ratio * norm
    plasticity = relative * slope

    drift = np.abs(np.expm1(gap))
    drift_off = drift * FUNCTION * u + np.exp(gap) * np.abs(gap) * u
    k3_off = drift_off + u * (np.abs(gap) + np.abs(np.expm1(gap) - gap))
    k3 = np.abs(np.expm1(gap) - gap)
    slope_off, size = drift_off + 8 * u * drift, drift
    kl_off, kl_size, kl_autodiff = k3_off, k3, 16 * u * (1 + np.exp(gap))
    if case.kl == "k3_ratio":
        # the ratio times all of it, off by what the ratio is; its own derivative adds k3, over tokens or their mean
        own = k3 if case.importance == "token" else (k3 * case.mask).sum(1, keepdims=True) / tokens
        own_off = k3_off if case.importance == "token" else (k3_off * case.mask).sum(1, keepdims=True) / tokens
        size = np.abs(gap) if case.importance == "token" else drift + own
        slope_off = 8 * u * size + (0 if case.importance == "token" else drift_off + own_off + (length + 4) * u * own)
        slope_off, size = ratio * (slope_off + (relative + 4 * u) * size), ratio * size
        # autodiff adds up the two parts of a token's slope, which cancel
        kl_autodiff = ratio * (kl_autodiff + 2 * own_off + 2 * (relative + (length + 8) * u) * (own + drift))
        kl_off, kl_size = ratio * (k3_off + (relative + 2 * u) * k3), ratio * k3
    stability = case.beta * norm * slope_off

    largest_gain = (
        np.maximum(ratio, np.clip(ratio, 1 - case.clip[0], 1 + case.clip[1])) * np.abs(case.advantages)[:, None] * norm
    )
    plasticity_loss = ((relative + (length + 8) * u) * largest_gain).sum(1)
    stability_loss = (case.beta * norm * (kl_off + (length + 8) * u * kl_size)).sum(1)
    count = max(int(case.mask.sum()), 1)
    kl = float(((kl_off + (n * length + 4) * u * kl_size) * case.mask).sum()) / count

    # autodiff goes through exp(gap) - 1, which cancels near the reference, and through other products of the same size
    autodiff = case.beta * norm * kl_autodiff
    floor = rounding_floor(dtype)
    h = _HIGHER_ORDERS
    return Bounds(
        h * plasticity_loss + floor,
        h * stability_loss + floor,
        h * plasticity + out * slope + floor,
        h * stability + out * case.beta * norm * size + floor,
        h * kl + floor,
        4 * u,
        3 * h * plasticity + 2 * out * slope + floor,
        2 * h * stability + 2 * out * case.beta * norm * size + h * autodiff + floor,
    )


def _norms(case: ObjectiveCase) -> Floats:
    """(n,) what one token of each response counts."""
    n, length = case.logp.shape
    tokens = np.maximum(case.mask.sum(1), 1)
    if case.normalization == "grpo":
        per_response: Floats = 1 / (tokens * float(case.normalizer or n))
        return per_response
    whole = float(n * length) if case.normalization == "dr_grpo" else float(max(case.mask.sum(), 1))
    return np.full(n, 1 / float(case.normalizer or whole), dtype=np.float64)
