"""GRPO's two losses and their closed-form derivatives with respect to the token log-probabilities.

Both gradients of GRPO are pullbacks of one map, parameters -> logp, so all an adapter needs from the loss are two
cotangents of shape (responses, tokens). They are known in closed form (math.md section 1): no autograd runs here.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, Generic, Literal, get_args

import array_api_compat

from pcr_core._namespace import (
    ArrayT,
    at_least_float32,
    common_namespace,
    is_traced,
    require_floating,
    require_shape,
)

Normalization = Literal["grpo", "dapo", "bnpo", "dr_grpo"]
Importance = Literal["token", "sequence"]
AdvantageScale = Literal["group", "batch", "none"]


@dataclass(frozen=True)
class Objective(Generic[ArrayT]):
    """Both losses of one batch of responses, with their derivatives.

    Attributes:
        plasticity_loss: (n,) each response's share of the clipped-surrogate loss; the sum is the loss.
        stability_loss: (n,) each response's share of beta * KL; the sum is the loss.
        plasticity_cotangent: (n, T) d(sum of plasticity_loss)/d logp, in logp's dtype, zero where masked.
        stability_cotangent: (n, T) d(sum of stability_loss)/d logp, in logp's dtype, zero where masked.
        kl: () k3 estimate of KL(policy || reference) in nats per token, without beta.
        clip_fraction: () fraction of response tokens (of responses, for sequence importance) whose gradient the clip
            stops.
    """

    plasticity_loss: ArrayT
    stability_loss: ArrayT
    plasticity_cotangent: ArrayT
    stability_cotangent: ArrayT
    kl: ArrayT
    clip_fraction: ArrayT


def group_advantages(
    rewards: ArrayT, group_ids: ArrayT, *, scale: AdvantageScale = "group", eps: float = 1e-4
) -> ArrayT:
    """Rewards relative to the mean of their group, in units of a standard deviation.

    Args:
        rewards: (n,) floating.
        group_ids: (n,) integer; responses to the same prompt share an id. May be traced.
        scale: divide by the group's standard deviation (Bessel-corrected, as TRL does), the batch's, or by nothing.
        eps: added to the standard deviation.

    Raises:
        TypeError: rewards not floating, group ids not integer, or arrays of different libraries.
        ValueError: shapes that do not match, or a group of one response where its deviation is asked for.

    Example:
        >>> import numpy as np
        >>> group_advantages(np.asarray([1.0, 0.0, 5.0, 3.0]), np.asarray([0, 0, 1, 1]), scale="none")
        array([ 0.5, -0.5,  1. , -1. ])
    """
    if scale not in get_args(AdvantageScale):
        raise ValueError(f"scale: expected one of {get_args(AdvantageScale)}, got {scale!r}")
    xp = common_namespace(rewards=rewards, group_ids=group_ids)
    require_floating(xp, rewards=rewards)
    require_shape((None,), "one reward a response", rewards=rewards)
    r: Any = rewards
    out = r.dtype
    same, count = group_membership(xp, group_ids, r.shape[0], "group_ids")
    r = at_least_float32(xp, r)
    m = xp.astype(count, r.dtype)
    centred = r - _group_sums(xp, same, r) / m
    if scale == "none":
        unscaled: ArrayT = xp.astype(centred, out)
        return unscaled
    if scale == "group":
        if not is_traced(count) and bool(xp.any(count < 2)):
            raise ValueError("group_ids: a group of one response has no standard deviation; use scale='none'")
        variance = _group_sums(xp, same, centred**2) / (m - 1)
    else:
        if r.shape[0] < 2:
            raise ValueError("rewards: one response has no standard deviation; use scale='none'")
        variance = xp.sum((r - xp.mean(r)) ** 2) / (r.shape[0] - 1)
    advantages: ArrayT = xp.astype(centred / (xp.sqrt(variance) + eps), out)
    return advantages


def _group_sums(xp: Any, same: Any, r: Any) -> Any:
    """(n,) sum of r over each response's group; a NaN stays in its group, which a product with 0 would not do."""
    return xp.sum(xp.where(same, r[None, :], xp.zeros_like(r)[None, :]), axis=1)


def group_membership(xp: Any, ids: Any, n: int, name: str) -> tuple[Any, Any]:
    """(n, n) whether i and j share a group, and (n,) the size of i's group; no shape depends on a value."""
    if not xp.isdtype(ids.dtype, "integral"):
        raise TypeError(f"{name}: expected integers, got {ids.dtype}")
    require_shape((n,), "one id a response", **{name: ids})
    same = ids[:, None] == ids[None, :]
    return same, xp.sum(xp.astype(same, xp.int32), axis=1)


def grpo_objective(
    logp: ArrayT,
    logp_old: ArrayT,
    logp_ref: ArrayT,
    advantages: ArrayT,
    mask: ArrayT,
    *,
    beta: float,
    clip: tuple[float, float] = (0.2, 0.2),
    normalization: Normalization = "grpo",
    importance: Importance = "token",
    normalizer: float | ArrayT | None = None,
) -> Objective[ArrayT]:
    """Clipped-surrogate and KL losses with their cotangents (math.md section 1; paper 5, 6, 8, 9).

    Args:
        logp: (n, T) log-probabilities of the response tokens under the policy.
        logp_old: (n, T) under the policy that sampled them (`logp` without its gradient, on the first inner step).
        logp_ref: (n, T) under the reference (starting) policy.
        advantages: (n,).
        mask: (n, T) boolean, or 0 and 1: which entries are response tokens. Masked entries may hold anything.
        beta: KL coefficient, >= 0; folded into the stability loss.
        clip: (low, high), both >= 0: the ratio is clipped to [1 - low, 1 + high].
        normalization: what a token's loss is divided by. "grpo": responses x its response's length; "dapo" and "bnpo":
            number of tokens; "dr_grpo": responses x T.
        importance: a ratio per "token", or one per response, the geometric mean over its tokens ("sequence", GSPO).
        normalizer: with accumulation, the same quantity over the *whole* batch, in place of this micro-batch's: number
            of responses (grpo), of tokens (dapo, bnpo), or responses x longest allowed response (dr_grpo). With one
            micro-batch dapo and bnpo agree; dapo is bnpo with the whole batch's token count passed here.

    Returns:
        An Objective. float32 inputs compute in float32, half precision is widened to float32 first.

    Raises:
        TypeError: integer arrays, or arrays of different libraries.
        ValueError: shapes, beta, clip, or a name that is not an option.

    Example:
        >>> import numpy as np
        >>> logp = np.log(np.asarray([[0.5, 0.25], [0.5, 0.5]]))
        >>> obj = grpo_objective(logp, logp, logp, np.asarray([1.0, -1.0]), np.ones((2, 2), dtype=bool), beta=0.1)
        >>> obj.plasticity_cotangent
        array([[-0.25, -0.25],
               [ 0.25,  0.25]])
    """
    _check_options(beta, clip, normalization, importance)
    xp = common_namespace(logp=logp, logp_old=logp_old, logp_ref=logp_ref, advantages=advantages, mask=mask)
    require_floating(xp, logp=logp, logp_old=logp_old, logp_ref=logp_ref, advantages=advantages)
    require_shape((None, None), "(responses, tokens)", logp=logp)
    lp: Any = logp
    n, length = lp.shape
    require_shape((n, length), "that of logp", logp_old=logp_old, logp_ref=logp_ref, mask=mask)
    require_shape((n,), "one advantage a response", advantages=advantages)

    out_dtype = lp.dtype
    keep: Any = xp.astype(mask, xp.bool)
    lp, old, ref = (_masked(xp, keep, x) for x in (lp, logp_old, logp_ref))
    dtype = lp.dtype
    advantage = xp.astype(advantages, dtype)[:, None]
    token = xp.astype(keep, dtype)
    norm, tokens = _normalization(xp, token, normalization, normalizer)

    count = xp.sum(token)  # of response tokens; `tokens` counts one for a response without any
    count = xp.where(count > 0, count, xp.ones_like(count))
    log_ratio = lp - old
    if importance == "sequence":
        log_ratio = xp.sum(log_ratio, axis=1, keepdims=True) / tokens
    ratio = xp.exp(log_ratio)
    low, high = 1 - clip[0], 1 + clip[1]
    gain = xp.minimum(ratio * advantage, xp.clip(ratio, low, high) * advantage)
    stopped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    slope = xp.where(stopped, xp.zeros_like(ratio), -advantage * ratio)
    if importance == "token":
        plasticity_cotangent = slope * norm
        clip_fraction = xp.sum(xp.astype(stopped, dtype) * token) / count
    else:
        plasticity_cotangent = slope / tokens * xp.sum(norm, axis=1, keepdims=True) * token
        clip_fraction = xp.sum(xp.astype(stopped, dtype)) / n

    gap = ref - lp
    drift = xp.expm1(gap)  # exp(gap) - 1 would lose every digit near the reference, where training starts
    k3 = drift - gap
    return Objective(
        plasticity_loss=-xp.sum(gain * norm, axis=1),
        stability_loss=beta * xp.sum(k3 * norm, axis=1),
        plasticity_cotangent=xp.astype(plasticity_cotangent, out_dtype),
        stability_cotangent=xp.astype(-beta * drift * norm, out_dtype),
        kl=xp.sum(k3) / count,
        clip_fraction=clip_fraction,
    )


def _masked(xp: Any, keep: Any, x: Any) -> Any:
    wide = at_least_float32(xp, x)
    return xp.where(keep, wide, xp.zeros_like(wide))


def _normalization(xp: Any, token: Any, normalization: Normalization, normalizer: Any) -> tuple[Any, Any]:
    """(n, T) weight of each token, zero where masked, and (n, 1) response lengths, at least 1."""
    scale = batch_normalizer(token, normalization) if normalizer is None else normalizer
    tokens = xp.sum(token, axis=1, keepdims=True)
    tokens = xp.where(tokens > 0, tokens, xp.ones_like(tokens))
    if normalization == "grpo":
        token = token / tokens
    return token / scale, tokens


def batch_normalizer(token: Any, normalization: Normalization) -> Any:
    """`grpo_objective`'s normalizer of a whole batch, from its (n, T) mask as floating 0 and 1."""
    n, length = token.shape
    if normalization == "grpo":
        return n
    if normalization == "dr_grpo":
        return n * length
    xp = common_namespace(token=token)
    total = xp.sum(token)
    return xp.where(total > 0, total, xp.ones_like(total))


def _check_options(beta: Any, clip: tuple[float, float], normalization: str, importance: str) -> None:
    if isinstance(beta, numbers.Real):
        if not 0 <= float(beta) < math.inf:
            raise ValueError(f"beta: expected a finite number >= 0, got {beta}")
    elif not array_api_compat.is_array_api_obj(beta):  # an array is trusted: it may be traced
        raise TypeError(f"beta: expected a finite number >= 0, got {beta!r}")
    if not isinstance(clip, (tuple, list)) or len(clip) != 2 or not all(bound >= 0 for bound in clip):
        raise ValueError(f"clip: expected (low, high), both >= 0, got {clip}")
    if normalization not in get_args(Normalization):
        raise ValueError(f"normalization: expected one of {get_args(Normalization)}, got {normalization!r}")
    if importance not in get_args(Importance):
        raise ValueError(f"importance: expected one of {get_args(Importance)}, got {importance!r}")
