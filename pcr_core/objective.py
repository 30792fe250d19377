"""GRPO's two losses and their closed-form derivatives with respect to the token log-probabilities.

Both gradients of GRPO are pullbacks of one map, parameters -> logp, so all an adapter needs from the loss are two
cotangents of shape (responses, tokens). They are known in closed form (math.md section 1): no autograd runs here.
"""

from __future__ import annotations

import math
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
from pcr_core._numbers import is_number, require_finite

Normalization = Literal["grpo", "dapo", "bnpo", "dr_grpo"]
Importance = Literal["token", "sequence"]
KL = Literal["k3", "k3_ratio"]
AdvantageScale = Literal["group", "batch", "none"]


@dataclass(frozen=True)
class Objective(Generic[ArrayT]):
    """Both losses of one batch of responses, with their derivatives.

    Attributes:
        plasticity_loss: (n,) each response's share of the clipped-surrogate loss; the sum is the loss.
        stability_loss: (n,) each response's share of beta * KL; the sum is the loss.
        plasticity_cotangent: (n, T) d(sum of plasticity_loss)/d logp, in logp's dtype, zero where masked.
        stability_cotangent: (n, T) d(sum of stability_loss)/d logp, in logp's dtype, zero where masked.
        kl: () estimate of KL(policy || reference) in nats per token, without beta: k3, or k3 times the ratio.
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

    The mean of the differences r_i - r_j is taken, which is r_i less the mean but does not lose the digits that large
    rewards have in common: rewards that are equal give exactly 0, and of m rewards each difference from the mean is off
    by less than m + 2 roundings of the distance between the group's smallest and largest reward.

    Args:
        rewards: (n,) floating.
        group_ids: (n,) integer; responses to the same prompt share an id. May be traced.
        scale: divide by the group's standard deviation (Bessel-corrected, as TRL does), the batch's, or by nothing.
        eps: added to the standard deviation; finite, >= 0. With 0, rewards that are all equal still give 0.

    Returns:
        (n,) in the dtype of `rewards`. A reward that is not finite makes its group not finite; with scale="batch", all.

    Raises:
        TypeError: rewards not floating, group ids not integer, or arrays of different libraries.
        ValueError: shapes that do not match, eps out of range, or a group of one response where its deviation is asked
            for.

    Example:
        >>> import numpy as np
        >>> group_advantages(np.asarray([1.0, 0.0, 5.0, 3.0]), np.asarray([0, 0, 1, 1]), scale="none")
        array([ 0.5, -0.5,  1. , -1. ])
    """
    if scale not in get_args(AdvantageScale):
        raise ValueError(f"scale: expected one of {get_args(AdvantageScale)}, got {scale!r}")
    margin = require_finite("eps", eps)
    xp = common_namespace(rewards=rewards, group_ids=group_ids)
    require_floating(xp, rewards=rewards)
    require_shape((None,), "one reward a response", rewards=rewards)
    r: Any = rewards
    out = r.dtype
    same, count = group_membership(xp, group_ids, r.shape[0], "group_ids")
    if scale == "group" and not is_traced(count) and bool(xp.any(count < 2)):
        raise ValueError("group_ids: a group of one response has no standard deviation; use scale='none'")
    if scale == "batch" and r.shape[0] < 2:
        raise ValueError("rewards: one response has no standard deviation; use scale='none'")
    if r.shape[0] == 0:
        return rewards
    r = at_least_float32(xp, r)
    centred = _centred(xp, r, same)
    if scale == "group":
        centred = _over(xp, centred, _deviation(xp, centred, same) + _like(xp, "eps", margin, r))
    elif scale == "batch":
        whole = xp.ones_like(same)
        centred = _over(xp, centred, _deviation(xp, _centred(xp, r, whole), whole) + _like(xp, "eps", margin, r))
    advantages: ArrayT = xp.astype(centred, out)
    return advantages


def _centred(xp: Any, r: Any, same: Any) -> Any:
    """(n,) mean of r_i - r_j over the j that are together with i."""
    return _sums(xp, r[:, None] - r[None, :], same) / _count(xp, r, same)


def _deviation(xp: Any, centred: Any, same: Any) -> Any:
    """(n,) standard deviation of those that are together; in units of the largest, whose square may leave the dtype."""
    sizes = xp.where(same, xp.abs(centred)[None, :], xp.zeros_like(centred)[None, :])
    largest = xp.max(sizes, axis=1)
    unit = xp.where(largest == 0, xp.ones_like(largest), largest)
    squares = _sums(xp, (centred[None, :] / unit[:, None]) ** 2, same)
    return unit * xp.sqrt(squares / (_count(xp, centred, same) - 1))


def _sums(xp: Any, x: Any, same: Any) -> Any:
    """(n,) sums of (n, n) numbers over those that are together; a NaN stays there, which a product with 0 would not."""
    return xp.sum(xp.where(same, x, xp.zeros_like(x)), axis=1)


def _count(xp: Any, like: Any, same: Any) -> Any:
    return xp.sum(xp.astype(same, like.dtype), axis=1)


def _over(xp: Any, x: Any, divisor: Any) -> Any:
    """x/divisor, and 0 where nothing differs from anything."""
    nothing = divisor == 0
    return xp.where(nothing, x, x / xp.where(nothing, xp.ones_like(divisor), divisor))


def _like(xp: Any, name: str, number: Any, x: Any) -> Any:
    """A float as it is, a () array in x's dtype; it may lie on the CPU, beside x on an accelerator."""
    if isinstance(number, float):
        return number
    if array_api_compat.array_namespace(number) is not array_api_compat.array_namespace(x):
        raise TypeError(f"{name}: expected a number, or an array of the others' library, got {type(number).__module__}")
    return xp.astype(number, x.dtype)


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
    kl: KL = "k3",
) -> Objective[ArrayT]:
    """Clipped-surrogate and KL losses with their cotangents (math.md section 1; paper 5, 6, 8, 9).

    Args:
        logp: (n, T) log-probabilities of the response tokens under the policy.
        logp_old: (n, T) under the policy that sampled them (`logp` without its gradient, on the first inner step).
        logp_ref: (n, T) under the reference (starting) policy.
        advantages: (n,).
        mask: (n, T) boolean, or 0 and 1: which entries are response tokens. Masked entries may hold anything. Other
            numbers are refused; where the mask is traced they come out as NaN.
        beta: KL coefficient, finite, >= 0; folded into the stability loss. A number, or an array that holds one.
        clip: (low, high), both >= 0: the ratio is clipped to [1 - low, 1 + high]; math.inf for no bound.
        normalization: what a token's loss is divided by. "grpo": responses x its response's length; "dapo" and "bnpo":
            number of tokens; "dr_grpo": responses x T.
        importance: a ratio per "token", or one per response, the geometric mean over its tokens ("sequence", GSPO).
        normalizer: with accumulation, the same quantity over the *whole* batch, in place of this micro-batch's: number
            of responses (grpo), of tokens (dapo, bnpo), or responses x longest allowed response (dr_grpo). With one
            micro-batch dapo and bnpo agree; dapo is bnpo with the whole batch's token count passed here. Finite, > 0;
            a number, or an array that holds one.
        kl: "k3", whose value estimates the KL where the responses are the policy's own (its gradient is that of
            KL(reference || policy) there); or "k3_ratio", k3 times the ratio of `importance`, unclipped and
            differentiated: with token ratios its value and gradient are unbiased, off policy too. The second is TRL's
            `use_bias_correction_kl`, on by default there. On policy both values agree and the derivatives do not:
            1 - exp(l) against -l, with l = logp_ref - logp.

    Returns:
        An Objective. float32 inputs compute in float32, half precision is widened to float32 first.

    Raises:
        TypeError: integer arrays, or arrays of different libraries.
        ValueError: shapes, a mask of other numbers than 0 and 1, beta, clip, normalizer, or a name that is not an
            option.

    Example:
        >>> import numpy as np
        >>> logp = np.log(np.asarray([[0.5, 0.25], [0.5, 0.5]]))
        >>> obj = grpo_objective(logp, logp, logp, np.asarray([1.0, -1.0]), np.ones((2, 2), dtype=bool), beta=0.1)
        >>> obj.plasticity_cotangent
        array([[-0.25, -0.25],
               [ 0.25,  0.25]])
    """
    beta, clip = check_options(beta, clip, normalization, importance, kl)
    if normalizer is not None:
        normalizer = require_finite("normalizer", normalizer, strict=True)
    xp = common_namespace(logp=logp, logp_old=logp_old, logp_ref=logp_ref, advantages=advantages, mask=mask)
    require_floating(xp, logp=logp, logp_old=logp_old, logp_ref=logp_ref, advantages=advantages)
    require_shape((None, None), "(responses, tokens)", logp=logp)
    lp: Any = logp
    n, length = lp.shape
    require_shape((n, length), "that of logp", logp_old=logp_old, logp_ref=logp_ref, mask=mask)
    require_shape((n,), "one advantage a response", advantages=advantages)

    out_dtype = lp.dtype
    keep, token = _response_tokens(xp, mask, at_least_float32(xp, lp).dtype)
    lp, old, ref = (_masked(xp, keep, x) for x in (lp, logp_old, logp_ref))
    dtype = lp.dtype
    advantage = xp.astype(advantages, dtype)[:, None]
    beta = _like(xp, "beta", beta, lp)
    normalizer = None if normalizer is None else _like(xp, "normalizer", normalizer, lp)
    norm, tokens = _normalization(xp, token, normalization, normalizer)

    count = _at_least_one(xp, xp.sum(token))  # of response tokens; `tokens` counts one for a response without any
    log_ratio = lp - old
    if importance == "sequence":
        log_ratio = xp.sum(log_ratio, axis=1, keepdims=True) / tokens
    ratio = xp.exp(log_ratio)
    low, high = 1 - clip[0], 1 + clip[1]
    gain = xp.minimum(ratio * advantage, xp.clip(ratio, low, high) * advantage)
    stopped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    # an advantage that is not finite shows, clip or not
    slope = xp.where(stopped & xp.isfinite(advantage), xp.zeros_like(ratio), -advantage * ratio)
    if importance == "token":
        plasticity_cotangent = slope * norm
        clip_fraction = xp.sum(xp.astype(stopped, dtype) * token) / count
    else:
        plasticity_cotangent = slope / tokens * xp.sum(norm, axis=1, keepdims=True) * token
        clip_fraction = xp.sum(xp.astype(stopped, dtype)) / max(n, 1)

    gap = ref - lp
    drift = xp.expm1(gap)  # exp(gap) - 1 would lose every digit near the reference, where training starts
    divergence = drift - gap
    stability_slope = -drift * norm
    if kl == "k3_ratio":
        if importance == "token":  # ratio (exp(l) - 1 - l) + ratio (1 - exp(l))
            stability_slope = -ratio * gap * norm
        else:
            through_ratio = xp.sum(divergence * norm, axis=1, keepdims=True) / tokens * token
            stability_slope = ratio * (through_ratio - drift * norm)
        divergence = ratio * divergence
    return Objective(
        plasticity_loss=-xp.sum(gain * norm, axis=1),
        stability_loss=beta * xp.sum(divergence * norm, axis=1),
        plasticity_cotangent=xp.astype(plasticity_cotangent, out_dtype),
        stability_cotangent=xp.astype(beta * stability_slope, out_dtype),
        kl=xp.sum(divergence) / count,
        clip_fraction=clip_fraction,
    )


def _response_tokens(xp: Any, mask: Any, dtype: Any) -> tuple[Any, Any]:
    """(n, T) which entries are response tokens, and the same as 0 and 1; NaN where a traced mask holds neither."""
    if str(mask.dtype) == "bfloat16":  # of ml_dtypes, which NumPy does not know
        mask = xp.astype(mask, xp.float32)
    if xp.isdtype(mask.dtype, "bool"):
        return mask, xp.astype(mask, dtype)
    if not xp.isdtype(mask.dtype, ("integral", "real floating")):
        raise TypeError(f"mask: expected booleans, or 0 and 1, got {mask.dtype}")
    keep = mask != 0
    good = (mask == 0) | (mask == 1)
    if not is_traced(good) and not bool(xp.all(good)):
        odd = float(xp.reshape(mask, (-1,))[int(xp.argmin(xp.reshape(xp.astype(good, xp.int32), (-1,))))])
        raise ValueError(f"mask: expected booleans, or 0 and 1, got {odd:g}")
    token = xp.astype(keep, dtype)
    return keep, xp.where(good, token, xp.full_like(token, math.nan))


def _at_least_one(xp: Any, count: Any) -> Any:
    """A NaN stays one."""
    return xp.where(count == 0, xp.ones_like(count), count)


def _masked(xp: Any, keep: Any, x: Any) -> Any:
    wide = at_least_float32(xp, x)
    return xp.where(keep, wide, xp.zeros_like(wide))


def _normalization(xp: Any, token: Any, normalization: Normalization, normalizer: Any) -> tuple[Any, Any]:
    """(n, T) weight of each token, zero where masked, and (n, 1) response lengths, at least 1."""
    scale = batch_normalizer(token, normalization) if normalizer is None else normalizer
    tokens = _at_least_one(xp, xp.sum(token, axis=1, keepdims=True))
    if normalization == "grpo":
        token = token / tokens
    return token / scale, tokens


def batch_normalizer(token: Any, normalization: Normalization) -> Any:
    """`grpo_objective`'s normalizer of a whole batch, from its (n, T) mask as floating 0 and 1."""
    n, length = token.shape
    if normalization == "grpo":
        return max(n, 1)
    if normalization == "dr_grpo":
        return max(n * length, 1)
    xp = common_namespace(token=token)
    return _at_least_one(xp, xp.sum(token))


def check_options(
    beta: Any, clip: Any, normalization: str, importance: str, kl: str
) -> tuple[Any, tuple[float, float]]:
    """beta and clip as `grpo_objective` computes with them; raises what it raises."""
    beta = require_finite("beta", beta)
    pair = isinstance(clip, (tuple, list)) and len(clip) == 2 and all(is_number(bound) for bound in clip)
    if not pair or not all(float(bound) >= 0 for bound in clip):
        raise ValueError(f"clip: expected (low, high), both numbers >= 0, got {clip!r}")
    for name, value, options in (
        ("normalization", normalization, Normalization),
        ("importance", importance, Importance),
        ("kl", kl, KL),
    ):
        if value not in get_args(options):
            raise ValueError(f"{name}: expected one of {get_args(options)}, got {value!r}")
    return beta, (float(clip[0]), float(clip[1]))
