"""Wrong objectives: clip, KL, ratios, normalisation, mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pcr_conformance.cases import ObjectiveCase
from pcr_conformance.mutants.wrong import Mutant
from pcr_core import Objective

_O = "objective_is_exact"


def _objective(change: Callable[[Objective[Any], ObjectiveCase], Objective[Any]]) -> Callable[..., Any]:
    return lambda run, case: change(run(case), case)


def _asked(change: Callable[[ObjectiveCase], ObjectiveCase]) -> Callable[..., Any]:
    return lambda run, case: run(change(case))


def _other_clip(run: Callable[[ObjectiveCase], Objective[Any]], case: ObjectiveCase) -> Objective[Any]:
    """For negative advantages the upper bound is taken, as if they were positive."""
    up, down = run(case), run(replace(case, advantages=np.abs(case.advantages)))
    sign = np.sign(case.advantages)
    return replace(
        up,
        plasticity_loss=sign * down.plasticity_loss,
        plasticity_cotangent=sign[:, None] * down.plasticity_cotangent,
    )


def _k1(o: Objective[Any], case: ObjectiveCase) -> Objective[Any]:
    """The derivative of logp - logp_ref, whose value is a constant."""
    gap = np.where(case.mask, case.logp_ref - case.logp, 0.0)
    factor = np.where(np.abs(1 - np.exp(gap)) > 0, 1 - np.exp(gap), 1.0)
    return replace(o, stability_cotangent=o.stability_cotangent / factor)


def _ratio_held(run: Callable[[ObjectiveCase], Objective[Any]], case: ObjectiveCase) -> Objective[Any]:
    """The derivative of k3 alone, times the ratio."""
    with_ratio = run(case)
    if case.kl == "k3":
        return with_ratio
    plain = run(replace(case, kl="k3")).stability_cotangent
    return replace(with_ratio, stability_cotangent=_kl_ratios(case) * plain)


def _ratio_clipped(run: Callable[[ObjectiveCase], Objective[Any]], case: ObjectiveCase) -> Objective[Any]:
    with_ratio = run(case)
    if case.kl == "k3":
        return with_ratio
    ratios = _kl_ratios(case)
    share = np.clip(ratios, 1 - case.clip[0], 1 + case.clip[1]) / ratios
    return replace(with_ratio, stability_cotangent=share * with_ratio.stability_cotangent)


def _kl_ratios(case: ObjectiveCase) -> Any:
    log_ratio = np.where(case.mask, case.logp - case.logp_old, 0.0)
    if case.importance == "sequence":
        log_ratio = log_ratio.sum(1, keepdims=True) / np.maximum(case.mask.sum(1, keepdims=True), 1)
    return np.exp(log_ratio)


def _gap_limited(most: float) -> Callable[..., Any]:
    def change(c: ObjectiveCase) -> ObjectiveCase:
        return replace(c, logp_ref=c.logp + np.clip(c.logp_ref - c.logp, -most, most))

    return _asked(change)


def _ratio_limited(most: float) -> Callable[..., Any]:
    return _asked(lambda c: replace(c, logp_old=c.logp - np.clip(c.logp - c.logp_old, -most, most)))


def _prefix(case: ObjectiveCase) -> ObjectiveCase:
    """The mask's length is right, and its place is not."""
    mask = np.arange(case.mask.shape[1])[None, :] < case.mask.sum(1)[:, None]
    filled = [np.where(np.isnan(x), 0.0, x) for x in (case.logp, case.logp_old, case.logp_ref)]
    return replace(case, mask=mask, logp=filled[0], logp_old=filled[1], logp_ref=filled[2])


def _dual_clip(o: Objective[Any], case: ObjectiveCase) -> Objective[Any]:
    """No more than 3 |A| is lost on a bad response."""
    if case.importance != "token":
        return o
    ratio = np.exp(np.where(case.mask, case.logp - case.logp_old, 0.0))
    beyond = (case.advantages[:, None] < 0) & (ratio > 3)
    return replace(o, plasticity_cotangent=np.where(beyond, 0.0, o.plasticity_cotangent))


def _counted(change: Callable[[float, ObjectiveCase], float]) -> Callable[..., Any]:
    return _objective(lambda o, c: replace(o, kl=np.asarray(change(float(o.kl), c))))


def _clipped(change: Callable[[float, ObjectiveCase], float]) -> Callable[..., Any]:
    return _objective(lambda o, c: replace(o, clip_fraction=np.asarray(change(float(o.clip_fraction), c))))


def _at_the_bound(o: Objective[Any], case: ObjectiveCase) -> Objective[Any]:
    """A ratio exactly at its bound is stopped."""
    log_ratio = np.where(case.mask, case.logp - case.logp_old, 0.0)
    a = case.advantages[:, None]
    at = (log_ratio == 0) & (((a > 0) & (case.clip[1] == 0)) | ((a < 0) & (case.clip[0] == 0)))
    return replace(o, plasticity_cotangent=np.where(at, 0.0, o.plasticity_cotangent))


def _near_reference(o: Objective[Any], case: ObjectiveCase) -> Objective[Any]:
    """exp(gap) - 1 as it stands."""
    gap = np.where(case.mask, case.logp_ref - case.logp, 0.0).astype(np.float32)
    naive = np.exp(gap) - np.float32(1)
    right = np.where(gap == 0, 1.0, np.expm1(gap.astype(np.float64)))
    return replace(o, stability_cotangent=o.stability_cotangent * np.where(gap == 0, 1.0, naive / right))


def _either_side(o: Objective[Any], case: ObjectiveCase) -> Objective[Any]:
    """Whatever the advantage's sign."""
    if case.importance == "sequence":
        return o
    ratio = np.exp(np.where(case.mask, case.logp - case.logp_old, 0.0))
    outside = ((ratio > 1 + case.clip[1]) | (ratio < 1 - case.clip[0])) & case.mask
    return replace(o, clip_fraction=np.asarray(outside.sum() / max(case.mask.sum(), 1)))


TOKENS: tuple[Mutant, ...] = (
    Mutant("clip direction for negative advantages", _O, "objective", _other_clip),
    Mutant("k1 for k3", _O, "objective", _objective(_k1)),
    Mutant("no ratio in the KL", _O, "objective", _asked(lambda c: replace(c, kl="k3"))),
    Mutant("ratio always in the KL", _O, "objective", _asked(lambda c: replace(c, kl="k3_ratio"))),
    Mutant("ratio in the KL not differentiated", _O, "objective", _ratio_held),
    Mutant("ratio in the KL clipped", _O, "objective", _ratio_clipped),
    Mutant("beta twice", _O, "objective", _asked(lambda c: replace(c, beta=c.beta**2))),
    Mutant("beta left out", _O, "objective", _asked(lambda c: replace(c, beta=1.0))),
    Mutant("no clip", _O, "objective", _asked(lambda c: replace(c, clip=(0.999, 1e9)))),
    Mutant("token ratios for sequence ratios", _O, "objective", _asked(lambda c: replace(c, importance="token"))),
    Mutant("normalisation ignored", _O, "objective", _asked(lambda c: replace(c, normalization="grpo"))),
    Mutant(
        "mask dropped",
        "masked_entries_have_no_say",
        "objective",
        _asked(lambda c: replace(c, mask=np.ones_like(c.mask))),
    ),
    Mutant("reference swapped with policy", _O, "objective", _asked(lambda c: replace(c, logp_ref=c.logp_old))),
    Mutant(
        "cotangent of the wrong sign",
        "cotangents_equal_autodiff",
        "autodiff",
        lambda o: (-o.plasticity_cotangent, o.stability_cotangent),
    ),
    Mutant("log-ratios within 20", _O, "objective", _ratio_limited(20.0)),
    Mutant("log-ratios within 10", _O, "objective", _ratio_limited(10.0)),
    Mutant("gaps to the reference within 20", _O, "objective", _gap_limited(20.0)),
    Mutant("gaps to the reference within 10", _O, "objective", _gap_limited(10.0)),
    Mutant("tokens taken for a prefix", _O, "objective", _asked(_prefix)),
    Mutant("dual clip", _O, "objective", _objective(_dual_clip)),
    Mutant("stopped at the bound itself", _O, "objective", _objective(_at_the_bound)),
    Mutant("exp less one near the reference", _O, "objective", _objective(_near_reference)),
    Mutant("same bound on both sides", _O, "objective", _asked(lambda c: replace(c, clip=(c.clip[0], c.clip[0])))),
    Mutant(
        "upper bound below for infinity",
        _O,
        "objective",
        _asked(lambda c: replace(c, clip=(min(c.clip[0], 10.0), min(c.clip[1], 10.0)))),
    ),
    Mutant("normalizer ignored", _O, "objective", _asked(lambda c: replace(c, normalizer=None))),
    Mutant("dapo is grpo", _O, "objective", _asked(lambda c: replace(c, normalization=_instead(c, "dapo", "grpo")))),
    Mutant(
        "bnpo is dr_grpo", _O, "objective", _asked(lambda c: replace(c, normalization=_instead(c, "bnpo", "dr_grpo")))
    ),
    Mutant("KL with beta", _O, "objective", _counted(lambda kl, c: kl * c.beta)),
    Mutant("KL a response", _O, "objective", _counted(lambda kl, c: kl * c.mask.sum() / len(c.mask))),
    Mutant("KL over padding", _O, "objective", _counted(lambda kl, c: kl * c.mask.mean())),
    Mutant(
        "KL is the loss's",
        _O,
        "objective",
        _objective(lambda o, c: replace(o, kl=o.stability_loss.sum() / max(c.beta, 1e-9))),
    ),
    Mutant("no KL where beta is 0", _O, "objective", _counted(lambda kl, c: kl if c.beta else 0.0)),
    Mutant("clip fraction over padding", _O, "objective", _clipped(lambda x, c: x * c.mask.mean())),
    Mutant("clip fraction left out", _O, "objective", _clipped(lambda x, c: 0.0)),
    Mutant(
        "clip fraction of tokens for sequences",
        _O,
        "objective",
        _clipped(lambda x, c: x * len(c.mask) / max(c.mask.sum(), 1) if c.importance == "sequence" else x),
    ),
    Mutant("clip fraction either side", _O, "objective", _objective(_either_side)),
    Mutant(
        "losses exchanged",
        _O,
        "objective",
        _objective(lambda o, c: replace(o, plasticity_loss=o.stability_loss, stability_loss=o.plasticity_loss)),
    ),
    Mutant(
        "loss of the wrong sign",
        _O,
        "objective",
        _objective(lambda o, c: replace(o, plasticity_loss=-o.plasticity_loss)),
    ),
    Mutant(
        "one loss for all responses",
        _O,
        "objective",
        _objective(lambda o, c: replace(o, plasticity_loss=o.plasticity_loss.sum(keepdims=True))),
    ),
    Mutant(
        "cotangent beyond half precision",
        _O,
        "objective",
        _objective(lambda o, c: replace(o, plasticity_cotangent=o.plasticity_cotangent * (1 + 2.0**-40))),
    ),
    Mutant(
        "infinite advantages clipped",
        "non_finite_tokens_are_not_hidden",
        "objective",
        _asked(lambda c: replace(c, advantages=np.nan_to_num(c.advantages))),
    ),
    Mutant(
        "a NaN reference is the policy",
        "non_finite_tokens_are_not_hidden",
        "objective",
        _asked(lambda c: replace(c, logp_ref=np.where(np.isnan(c.logp_ref), c.logp, c.logp_ref))),
    ),
    Mutant(
        "a NaN spoils all responses",
        "non_finite_tokens_are_not_hidden",
        "objective",
        _objective(lambda o, c: replace(o, plasticity_loss=o.plasticity_loss + 0 * o.plasticity_loss.sum())),
    ),
)


def _instead(case: ObjectiveCase, one: str, other: str) -> str:
    return other if case.normalization == one else str(case.normalization)
