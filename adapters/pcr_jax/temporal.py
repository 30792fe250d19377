"""The temporal prior over a pytree of gradients: a scalar Kalman filter per block and stream (math.md section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array

import pcr_core
from pcr_core import BlockStatistics, PriorState, Rule, TemporalPrior, Weights
from pcr_jax.blocks import Blocks
from pcr_jax.checks import check_blocks, check_floating
from pcr_jax.products import block_products, for_leaf, wide_dtype
from pcr_jax.sharding import Layout


def is_temporal(rule: Rule) -> TypeGuard[pcr_core.PCR]:
    return isinstance(rule, pcr_core.PCR) and isinstance(rule.prior, TemporalPrior)


def init_prior(params: Any, blocks: Blocks) -> PriorState[Any]:
    """What `resolve` takes as `prior` at the first step: nothing is known, so the variances are infinite.

    Args:
        params: the tree that `blocks` were selected on, or its gradients.
        blocks: of `select_blocks`.

    Returns:
        A pytree. Its means are tuples of arrays like the leaves in blocks, in the order of `blocks.leaves`, in float32
        or wider; its variances have shape (blocks,).

    Example:
        >>> import jax.numpy as jnp
        >>> from pcr_jax import select_blocks
        >>> params = {"w": jnp.ones((2, 3))}
        >>> prior = init_prior(params, select_blocks(params, "all"))
        >>> prior.stability_mean[0].shape, prior.stability_var.tolist()
        ((2, 3), [inf])
    """
    check_floating(params, "params")
    check_blocks(params, blocks, "params")
    leaves = jax.tree.leaves(params)

    def means() -> Any:  # of each stream its own, since steps take the memory of what they are given
        return tuple(jnp.zeros_like(x, dtype=_mean_dtype(x)) for x in (leaves[k] for k in blocks.leaves))

    def unknown() -> Array:
        return jnp.full((len(blocks.names),), jnp.inf, dtype=wide_dtype())

    return PriorState(means(), means(), unknown(), unknown())


def filtered(
    rule: pcr_core.PCR,
    statistics: BlockStatistics[Array],
    plasticity: Sequence[Array],
    stability: Sequence[Array],
    prior: Any,
    blocks: Blocks,
    layout: Layout | None = None,
) -> tuple[Weights[Array], list[Array], list[Array], PriorState[Any]]:
    """Weights of the posterior means, all leaves with these in the place of the totals, and the next step's prior."""
    _check_prior(prior, plasticity, blocks)
    posteriors = rule.posteriors(statistics, (prior.plasticity_var, prior.stability_var))
    # a step that is not finite is no evidence: its update is NaN, and the filter of that block waits
    finite = pcr_core.GRPO()(statistics).finite
    streams: list[list[Array]] = []
    kept: list[tuple[Array, ...]] = []
    for totals, means, posterior in zip(
        (plasticity, stability), (prior.plasticity_mean, prior.stability_mean), posteriors, strict=True
    ):
        stream, keep = list(totals), []
        for k, mean in zip(blocks.leaves, means, strict=True):
            gain = for_leaf(blocks, k, posterior.gain, mean.ndim).astype(mean.dtype)
            stream[k] = gain * totals[k].astype(mean.dtype) + (1 - gain) * mean
            keep.append(jnp.where(for_leaf(blocks, k, finite, mean.ndim), stream[k], mean))
        streams.append(stream)
        kept.append(tuple(keep))
    axes = () if layout is None else tuple(layout.mesh.axis_names)
    products = block_products(streams[0], streams[1], blocks, layout, axes)
    weights = rule.project(
        replace(
            statistics,
            plasticity_sq=products[0],
            stability_sq=products[1],
            dot=products[2],
            plasticity_var=posteriors[0].variance,
            stability_var=posteriors[1].variance,
        )
    )
    variances = (
        jnp.where(finite, posterior.variance, last)
        for posterior, last in zip(posteriors, (prior.plasticity_var, prior.stability_var), strict=True)
    )
    return weights, streams[0], streams[1], PriorState(*kept, *variances)


def _mean_dtype(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _check_prior(prior: Any, totals: Sequence[Array], blocks: Blocks) -> None:
    if not isinstance(prior, PriorState):
        raise TypeError(f"prior: expected a PriorState, of init_prior or the last report, got {type(prior).__name__}")
    check_floating(prior, "prior")
    expected = [tuple(totals[k].shape) for k in blocks.leaves]
    for name in ("plasticity_mean", "stability_mean"):
        got = [tuple(x.shape) for x in jax.tree.leaves(getattr(prior, name))]
        if got != expected:
            raise ValueError(f"prior: {name} has arrays of shapes {got}, the leaves in blocks have {expected}")
    for name in ("plasticity_var", "stability_var"):
        if tuple(getattr(prior, name).shape) != (len(blocks.names),):
            raise ValueError(
                f"prior: {name} has shape {getattr(prior, name).shape}, there are {len(blocks.names)} blocks"
            )
