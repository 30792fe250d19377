"""Reference for the objective in 100 digits: the losses from their definitions, derivatives by differencing them.

The closed-form cotangents that the library uses appear nowhere here; that is what makes the comparison worth having.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np

from pcr_conformance.cases import Floats, Integers, ObjectiveCase, group_slots

DIGITS = 100
STEP = "1e-22"  # a one-sided difference errs by about as much, and loses 22 of the digits


@dataclass(frozen=True)
class Reference:
    plasticity_loss: Floats
    stability_loss: Floats
    plasticity_cotangent: Floats
    stability_cotangent: Floats
    kl: float
    clip_fraction: float


def objective(case: ObjectiveCase) -> Reference:
    n, length = case.logp.shape
    losses, cotangents = np.zeros((2, n)), np.zeros((2, n, length))
    kl = clipped = mpmath.mpf(0)
    tokens = max(int(case.mask.sum()), 1)
    with mpmath.workdps(DIGITS):
        h = mpmath.mpf(STEP)
        for i in range(n):
            where = np.flatnonzero(case.mask[i])
            row = [mpmath.mpf(float(case.logp[i, j])) for j in where]
            here = _losses(case, i, row)
            losses[:, i] = [float(x) for x in here]
            # at a clip bound the gradient passes: the side where the surrogate still moves; the KL is smooth
            step = -h if case.advantages[i] > 0 else h
            for k, j in enumerate(where):
                there, back = row.copy(), row.copy()
                there[k] += step
                back[k] -= step
                ahead, behind = _losses(case, i, there), _losses(case, i, back)
                cotangents[0, i, j] = float((ahead[0] - here[0]) / step)
                cotangents[1, i, j] = float((ahead[1] - behind[1]) / (2 * step))
            kl += sum(_weighted_divergences(case, i, row))
            clipped += _stopped(case, i, row)
        per = n if case.importance == "sequence" else tokens
        return Reference(losses[0], losses[1], cotangents[0], cotangents[1], float(kl / tokens), float(clipped / per))


def _losses(case: ObjectiveCase, i: int, row: list[Any]) -> tuple[Any, Any]:
    """Both losses of response i: sums over its tokens of surrogate and KL times the normalisation."""
    advantage = mpmath.mpf(float(case.advantages[i]))
    low, high = 1 - mpmath.mpf(case.clip[0]), 1 + mpmath.mpf(case.clip[1])
    norm = _norm(case, i)
    gains = [min(rho * advantage, min(max(rho, low), high) * advantage) for rho in _ratios(case, i, row)]
    return -sum(gains) * norm, mpmath.mpf(case.beta) * sum(_weighted_divergences(case, i, row)) * norm


def _ratios(case: ObjectiveCase, i: int, row: list[Any]) -> list[Any]:
    where = np.flatnonzero(case.mask[i])
    logs = [x - mpmath.mpf(float(case.logp_old[i, j])) for x, j in zip(row, where)]
    if case.importance == "sequence" and logs:
        logs = [sum(logs) / len(logs)] * len(logs)
    return [mpmath.exp(x) for x in logs]


def _divergences(case: ObjectiveCase, i: int, row: list[Any]) -> list[Any]:
    gaps = [mpmath.mpf(float(case.logp_ref[i, j])) - x for x, j in zip(row, np.flatnonzero(case.mask[i]))]
    return [mpmath.exp(gap) - gap - 1 for gap in gaps]


def _weighted_divergences(case: ObjectiveCase, i: int, row: list[Any]) -> list[Any]:
    """k3 of each token, times its ratio where the case asks for that."""
    values = _divergences(case, i, row)
    if case.kl == "k3_ratio":
        values = [rho * value for rho, value in zip(_ratios(case, i, row), values, strict=True)]
    return values


def _norm(case: ObjectiveCase, i: int) -> Any:
    n, length = case.logp.shape
    whole = None if case.normalizer is None else mpmath.mpf(float(case.normalizer))
    if case.normalization == "grpo":
        return 1 / mpmath.mpf(max(int(case.mask[i].sum()), 1)) / (whole or n)
    if case.normalization == "dr_grpo":
        return 1 / (whole or mpmath.mpf(n * length))
    return 1 / (whole or mpmath.mpf(max(int(case.mask.sum()), 1)))


def _stopped(case: ObjectiveCase, i: int, row: list[Any]) -> int:
    """How many tokens (or, for sequence importance, whether the response) lie where the clip is flat."""
    advantage = case.advantages[i]
    ratios = _ratios(case, i, row)
    if case.importance == "sequence":
        ratios = ratios[:1]
    high, low = 1 + case.clip[1], 1 - case.clip[0]
    return sum(bool((advantage > 0 and rho > high) or (advantage < 0 and rho < low)) for rho in ratios)


def advantages(rewards: Floats, group_ids: Integers, scale: str, eps: float) -> Floats:
    """(r - mean of its group) / (standard deviation + eps), the deviation with Bessel's correction."""
    out = np.zeros(len(rewards))
    with mpmath.workdps(DIGITS):
        r = [mpmath.mpf(float(x)) for x in rewards]
        whole = _deviation(r) if scale == "batch" else None
        for slots in group_slots(group_ids):
            group = [r[i] for i in slots]
            mean = sum(group) / len(group)
            if scale == "none":
                divisor = mpmath.mpf(1)
            else:
                divisor = (_deviation(group) if whole is None else whole) + mpmath.mpf(eps)
            for i in slots:
                out[i] = float((r[i] - mean) / divisor)
    return out


def _deviation(values: list[Any]) -> Any:
    mean = sum(values) / len(values)
    return mpmath.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
