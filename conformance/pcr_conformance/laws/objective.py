"""Law 9: the closed-form derivatives of both losses, and the losses themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pcr_conformance import oracle_objective
from pcr_conformance.adapter import Adapter, epsilon, seen
from pcr_conformance.cases import Floats, ObjectiveCase
from pcr_conformance.laws.checks import close, same_bits


def cotangents_equal_autodiff(adapter: Adapter, case: ObjectiveCase, dtype: str, ulps: float = 64) -> None:
    """Law 9: the framework's own derivatives of the losses are the closed-form cotangents."""
    case = objective_as_seen(adapter, case, dtype)
    if not clear_of_kinks(case):
        return
    derivatives = adapter.autodiff(case, dtype)
    assert derivatives is not None, f"{adapter.name} has no automatic differentiation"
    got = adapter.objective(case, dtype)
    allowed = ulps * epsilon(dtype) * _cotangent_sizes(case)
    law = f"law 9 (autodiff), {case.normalization}, {case.importance}"
    close(law, "plasticity_cotangent", got.plasticity_cotangent, derivatives[0], allowed[0])
    close(law, "stability_cotangent", got.stability_cotangent, derivatives[1], allowed[1])


def objective_is_exact(adapter: Adapter, case: ObjectiveCase, dtype: str, ulps: float = 64) -> None:
    """Losses are those of section 1 and cotangents their derivatives, as found by differencing in 50 digits."""
    case = objective_as_seen(adapter, case, dtype)
    if not clear_of_kinks(case):
        return
    got, expected = adapter.objective(case, dtype), oracle_objective.objective(case)
    law = f"objective, {case.normalization}, {case.importance}"
    inner = ulps * epsilon("float32" if dtype in ("float16", "bfloat16") else dtype)
    # cotangents come back in logp's dtype, losses in the wider one
    allowed = (inner + epsilon(dtype)) * _cotangent_sizes(case)
    if dtype == "float16":
        allowed = allowed + 2.0**-24
    close(law, "plasticity_cotangent", got.plasticity_cotangent, expected.plasticity_cotangent, allowed[0])
    # relative in the gap to the reference, however small: it is tiny at the start of training
    floor = 2.0**-24 if dtype == "float16" else 1e-30  # subnormal halves; the reference's own error
    relative = (inner + epsilon(dtype)) * np.abs(expected.stability_cotangent) + floor
    close(law, "stability_cotangent", got.stability_cotangent, expected.stability_cotangent, relative)
    plasticity, stability = _loss_sizes(case)
    close(law, "plasticity_loss", got.plasticity_loss, expected.plasticity_loss, inner * plasticity)
    close(law, "stability_loss", got.stability_loss, expected.stability_loss, inner * stability)
    close(law, "kl", got.kl, expected.kl, inner * (1 + np.nanmax(np.exp(np.abs(_gap(case))))))
    close(law, "clip_fraction", got.clip_fraction, expected.clip_fraction, inner)


def masked_entries_have_no_say(adapter: Adapter, case: ObjectiveCase, dtype: str) -> None:
    """What stands behind the mask, NaN or number, changes no bit, and the cotangents are zero there."""
    behind = ~case.mask
    filled, empty = (_behind(case, behind, value) for value in (0.3, np.nan))
    a, b = adapter.objective(filled, dtype), adapter.objective(empty, dtype)
    for name in ("plasticity_loss", "stability_loss", "plasticity_cotangent", "stability_cotangent", "kl"):
        same_bits("masked entries", name, getattr(b, name), getattr(a, name))
        assert np.isfinite(getattr(b, name)).all(), f"masked entries: NaN came through into {name}"
    for cotangent in (b.plasticity_cotangent, b.stability_cotangent):
        assert (cotangent[behind] == 0).all(), f"masked entries: a derivative behind the mask: {cotangent}"


def objective_as_seen(adapter: Adapter, case: ObjectiveCase, dtype: str) -> ObjectiveCase:
    return replace(
        case,
        logp=seen(adapter, case.logp, dtype),
        logp_old=seen(adapter, case.logp_old, dtype),
        logp_ref=seen(adapter, case.logp_ref, dtype),
        advantages=seen(adapter, case.advantages, dtype),
    )


def _behind(case: ObjectiveCase, behind: Any, value: float) -> ObjectiveCase:
    logp, old, ref = (np.where(behind, value, x) for x in (case.logp, case.logp_old, case.logp_ref))
    return replace(case, logp=logp, logp_old=old, logp_ref=ref)


def clear_of_kinks(case: ObjectiveCase, distance: float = 1e-4) -> bool:
    """Whether no ratio is so near a clip bound that rounding decides on which side it lies."""
    log_ratio: Floats = np.where(case.mask, case.logp - case.logp_old, 0.0)
    mean = log_ratio.sum(1, keepdims=True) / np.maximum(case.mask.sum(1, keepdims=True), 1)
    ratios = np.exp(np.concatenate([log_ratio, mean], axis=1))
    return all(bool((np.abs(ratios - bound) > distance).all()) for bound in (1 - case.clip[0], 1 + case.clip[1]))


def _gap(case: ObjectiveCase) -> Floats:
    gap: Floats = np.where(case.mask, case.logp_ref - case.logp, 0.0)
    return gap


def _cotangent_sizes(case: ObjectiveCase) -> Floats:
    """Scale of the terms that are added up in either cotangent, (2, n, T)."""
    log_ratio = np.where(case.mask, case.logp - case.logp_old, 0.0)
    spread = 1 + np.where(case.mask, np.abs(case.logp) + np.abs(case.logp_old) + np.abs(case.logp_ref), 0.0)
    norm = _norms(case)[:, None] * spread.max(1, keepdims=True)
    ratio = np.exp(np.abs(log_ratio).max(1, keepdims=True))
    sizes: Floats = np.stack(
        [
            norm * np.abs(case.advantages)[:, None] * ratio * np.ones_like(log_ratio),
            case.beta * norm * (1 + np.exp(_gap(case))),
        ]
    )
    return sizes


def _loss_sizes(case: ObjectiveCase) -> tuple[Floats, Floats]:
    sizes = _cotangent_sizes(case)
    return sizes[0].sum(1), sizes[1].sum(1)


def _norms(case: ObjectiveCase) -> Floats:
    """(n,) what one token of each response counts."""
    n, length = case.logp.shape
    tokens = np.maximum(case.mask.sum(1), 1)
    if case.normalization == "grpo":
        per_response: Floats = 1 / (tokens * float(case.normalizer or n))
        return per_response
    whole = float(n * length) if case.normalization == "dr_grpo" else float(max(case.mask.sum(), 1))
    return np.full(n, 1 / float(case.normalizer or whole), dtype=np.float64)
