"""Law 9: the closed-form derivatives of both losses, and the losses themselves."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np

from pcr_conformance import oracle_objective
from pcr_conformance.adapter import Adapter, seen
from pcr_conformance.cases import Floats, ObjectiveCase
from pcr_conformance.laws.checks import close, same_bits
from pcr_conformance.objective_bounds import bounds


def cotangents_equal_autodiff(adapter: Adapter, case: ObjectiveCase, dtype: str) -> None:
    """Law 9: the framework's own derivatives of the losses are the closed-form cotangents."""
    case = objective_as_seen(adapter, case, dtype)
    if not clear_of_kinks(case):
        return
    derivatives = adapter.autodiff(case, dtype)
    assert derivatives is not None, f"{adapter.name} has no automatic differentiation"
    got, allowed = adapter.objective(case, dtype), bounds(case, dtype)
    law = f"law 9 (autodiff), {case.normalization}, {case.importance}, {case.kl}"
    for name, derivative, off in (
        ("plasticity_cotangent", derivatives[0], allowed.plasticity_derivative),
        ("stability_cotangent", derivatives[1], allowed.stability_derivative),
    ):
        close(law, name, getattr(got, name), derivative, getattr(allowed, name) + off)


def objective_is_exact(adapter: Adapter, case: ObjectiveCase, dtype: str) -> None:
    """Losses are those of section 1 and cotangents their derivatives, as found by differencing in 100 digits."""
    judge_objective("objective", adapter, objective_as_seen(adapter, case, dtype), dtype)


def judge_objective(law: str, adapter: Adapter, case: ObjectiveCase, dtype: str) -> None:
    """Every field of the record, of a case as the implementation sees it."""
    if not clear_of_kinks(case):
        return
    got, expected, allowed = adapter.objective(case, dtype), oracle_objective.objective(case), bounds(case, dtype)
    law = f"{law}, {case.normalization}, {case.importance}, {case.kl}"
    for f in fields(oracle_objective.Reference):
        x, exact = np.asarray(getattr(got, f.name)), getattr(expected, f.name)
        assert x.dtype == np.float64, f"{law}: {f.name} has dtype {x.dtype}, expected float64"
        assert x.shape == np.shape(exact), f"{law}: {f.name} has shape {x.shape}, expected {np.shape(exact)}"
        bound = getattr(allowed, f.name)
        # the reference's own derivatives are good to 20 digits
        close(law, f.name, x, exact, bound + 1e-30 + 1e-20 * np.abs(exact))
    for name in ("plasticity_cotangent", "stability_cotangent"):  # they come back in the dtype of logp
        x = getattr(got, name)
        same_bits(f"{law}, rounded to {dtype}", name, x, seen(adapter, x, dtype))


def non_finite_tokens_are_not_hidden(adapter: Adapter, case: ObjectiveCase, dtype: str, field: str, bad: float) -> None:
    """Law 11: a number that is not finite shows in its response, clipped or not; other responses keep every bit."""
    rows = np.flatnonzero(case.mask.any(axis=1))
    if not len(rows):
        return
    row = int(rows[0])
    x: Any = np.array(getattr(case, field))
    if field == "advantages":
        x[row] = bad
    else:
        x[row, np.flatnonzero(case.mask[row])[0]] = bad
    clean, hurt = adapter.objective(case, dtype), adapter.objective(replace(case, **{field: x}), dtype)
    law = f"law 11 (tokens), {case.importance}, {case.kl}, {field} {bad} in response {row}"
    names = (
        ("stability",) if field == "logp_ref" else ("plasticity",) if field != "logp" else ("plasticity", "stability")
    )
    for name in names if case.beta else tuple(n for n in names if n == "plasticity"):
        found = getattr(hurt, f"{name}_cotangent")[row]
        assert not np.isfinite(found).all(), f"{law}: the {name} cotangent is {found}"
    others = np.arange(len(case.advantages)) != row
    for f in ("plasticity_loss", "stability_loss", "plasticity_cotangent", "stability_cotangent"):
        same_bits(f"{law}, other responses", f, getattr(hurt, f)[others], getattr(clean, f)[others])


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
    """Whether no ratio is so near a clip bound that rounding decides on which side it lies.

    A ratio of exactly 1 at a bound of exactly 1 is on the side where the gradient passes.
    """
    log_ratio: Floats = np.where(case.mask, case.logp - case.logp_old, 0.0)
    mean = log_ratio.sum(1, keepdims=True) / np.maximum(case.mask.sum(1, keepdims=True), 1)
    ratios = np.exp(np.concatenate([log_ratio, mean], axis=1))
    bounds = [bound for bound in (1 - case.clip[0], 1 + case.clip[1]) if np.isfinite(bound)]
    return all(bool(((np.abs(ratios - x) > distance) | ((ratios == 1) & (x == 1))).all()) for x in bounds)
