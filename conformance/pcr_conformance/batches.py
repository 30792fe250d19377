"""Random batches for the objective: log-probabilities by regime, masks of any form, and every option."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np

from pcr_conformance.cases import Floats, ObjectiveCase
from pcr_conformance.drawing import Draw

NORMALIZATIONS = ("grpo", "dapo", "bnpo", "dr_grpo")
IMPORTANCES = ("token", "sequence")
KLS = ("k3", "k3_ratio")
BETAS = (0.04, 1.0, 0.0, 2.5)
#: a bound of 0 lies exactly at the ratio of what is on policy, whose gradient passes; one may be missing
CLIPS = ((0.2, 0.2), (0.2, 0.28), (0.05, 0.4), (0.0, 0.0), (0.3, math.inf), (math.inf, 0.1), (1.5, 0.2))
NORMALIZERS = (None, 17.0, 0.5)

ObjectiveOptions = tuple[float, tuple[float, float], str, str, float | None, str]

#: every value of every option at least once, for frameworks that compile each combination
FEW_COMBINATIONS: tuple[ObjectiveOptions, ...] = (
    (0.04, (0.2, 0.2), "grpo", "token", None, "k3"),
    (1.0, (0.2, 0.28), "dapo", "sequence", None, "k3_ratio"),
    (0.04, (0.05, 0.4), "bnpo", "token", 17.0, "k3_ratio"),
    (0.0, (0.2, 0.2), "dr_grpo", "sequence", 17.0, "k3"),
)

TOKEN_REGIMES = (
    "off policy",
    "on policy",
    "far from reference",
    "near reference",
    "at reference",
    "far off policy",
    "far from both",
    "one token far",
)
#: what exp of it squared still is in range, for the ratio times exp(gap)
_FAR = {"float16": 1.5, "bfloat16": 30.0, "float32": 30.0, "float64": 40.0}
_MASKS = ("prefix", "suffix", "holes", "full", "one token")


def objective_case(
    draw: Draw,
    dtype: str = "float64",
    *,
    shapes: tuple[tuple[int, int], ...] = ((4, 3), (3, 5), (6, 2), (1, 4), (5, 1)),
    normalization: str | None = None,
    importance: str | None = None,
    combinations: tuple[ObjectiveOptions, ...] | None = None,
    smooth: bool = False,
) -> ObjectiveCase:
    """A batch of responses; masked entries hold NaN, and ratios stay clear of the kinks at the clip bounds.

    `combinations` are the options to choose among, each of which costs a compiled framework a compilation; by default
    every combination of normalisation, importance and KL comes once in 16 examples. `smooth` leaves out the clip bounds
    at which frameworks differ in what a derivative is.
    """
    n, length = draw.deal("shape", shapes)
    regime = draw.deal("regime", TOKEN_REGIMES)
    rng, far = draw.rng, _FAR[dtype]
    logp = -rng.exponential(size=(n, length))
    old = logp if regime == "on policy" else logp + 0.4 * rng.normal(size=(n, length))
    reach = {"near reference": 1e-5, "at reference": 0.0}.get(regime, 0.5)
    ref = logp + reach * rng.normal(size=(n, length))
    if regime in ("far off policy", "far from both"):
        old = logp + far * rng.uniform(-1, 1, size=(n, length))
    if regime in ("far from reference", "far from both"):
        ref = logp + far * rng.uniform(-1, 1, size=(n, length))
    if regime == "one token far":
        old[0, 0], ref[-1, -1] = logp[0, 0] + far * rng.choice([-1, 1]), logp[-1, -1] + far * rng.choice([-1, 1])
    advantages = rng.normal(size=n) * draw.pick((1.0, 1.0, 1e-3, 30.0))
    if draw.coin():
        advantages[draw.integer(0, n - 1)] = 0.0
    mask = _mask(draw, n, length)
    beta, clip, normalized, ratios, normalizer, kl = _options(draw, combinations)
    clip = (0.2, 0.28) if smooth and 0 in clip else clip
    old = np.where(_near_kink(np.where(mask, logp - old, 0.0), mask, clip), logp, old)
    logp, old, ref = (np.where(mask, x, np.nan) for x in (logp, old, ref))
    return ObjectiveCase(
        logp,
        old,
        ref,
        advantages,
        mask,
        beta=beta,
        clip=clip,
        normalization=normalization or normalized,
        importance=importance or ratios,
        normalizer=normalizer,
        kl=kl,
        regime=regime,
    )


def _options(draw: Draw, combinations: tuple[ObjectiveOptions, ...] | None) -> ObjectiveOptions:
    if combinations is not None:
        return draw.deal("options", combinations)
    normalization, importance, kl = draw.deal("options", tuple(product(NORMALIZATIONS, IMPORTANCES, KLS)))
    beta, clip = draw.deal("beta", BETAS), draw.deal("clip", CLIPS)
    return beta, clip, normalization, importance, draw.deal("normalizer", NORMALIZERS), kl


def _mask(draw: Draw, n: int, length: int) -> Any:
    kind = draw.deal("mask", _MASKS)
    lengths = draw.rng.integers(1, length + 1, size=n)
    if kind == "full":
        lengths[:] = length
    if kind == "one token":
        lengths[:] = 1
    if draw.coin():
        lengths[draw.integer(0, n - 1)] = 0  # a response without tokens
    mask = np.arange(length)[None, :] < lengths[:, None]
    if kind == "suffix":
        mask = mask[:, ::-1]
    if kind in ("holes", "one token"):
        mask = draw.rng.permuted(mask, axis=1)
    return np.ascontiguousarray(mask)


def _near_kink(log_ratio: Floats, mask: Any, clip: tuple[float, float]) -> Any:
    """Rows where a ratio, by token or by response, is so close to a clip bound that rounding could move it across."""
    mean = log_ratio.sum(1, keepdims=True) / np.maximum(mask.sum(1, keepdims=True), 1)
    ratios = np.exp(np.concatenate([log_ratio, mean], axis=1))
    bounds = np.asarray([1 - clip[0], 1 + clip[1]])
    return (np.abs(ratios[..., None] - bounds) < 1e-3).any(axis=(1, 2))[:, None]
