"""Two gradients as pytrees in, the update out; pure, so that it can be part of any compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

import pcr_core
from pcr_core import BlockStatistics, PriorState, Rule, Scatter, Weights
from pcr_core.rules import require_rule
from pcr_jax.blocks import Blocks, Selector, select_blocks
from pcr_jax.checks import check_blocks, check_floating
from pcr_jax.products import block_products, by_block, for_leaf, wide_dtype
from pcr_jax.records import register
from pcr_jax.sharding import Layout
from pcr_jax.temporal import filtered, is_temporal

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Report:
    """What was decided on what; arrays of shape (blocks,). A pytree, whose `blocks` are part of its structure.

    `prior` is what TemporalPrior carries to the next step, None with other rules. With it, `weights` are those of the
    filtered means; `statistics` are always those of the totals.
    """

    weights: Weights[Array]
    statistics: BlockStatistics[Array]
    blocks: Blocks
    prior: PriorState[Any] | None = None


register(Report, static=("blocks",))


def resolve(
    plasticity_grads: Tree,
    stability_grads: Tree,
    statistics: Scatter[Array] | BlockStatistics[Array] | None,
    rule: Rule = pcr_core.PCR(),
    *,
    blocks: Blocks | Selector = "mlp",
    prior: PriorState[Any] | None = None,
    layout: Layout | None = None,
) -> tuple[Tree, Report]:
    """The update a P + b S with the rule's two weights per block, and P + S outside the blocks.

    Nothing of a gradient's size is formed but the update, which takes the memory of a gradient where that is donated:
    `jax.jit(resolve, static_argnames=("rule", "blocks"), donate_argnums=(0,))`.

    Args:
        plasticity_grads: pytree of floating arrays, the total plasticity gradient P.
        stability_grads: the same structure and shapes: the total stability gradient S, beta included.
        statistics: the Scatter of both (`pullback(...).scatter()`), to which the inner products of the totals are
            added here; or complete BlockStatistics. Arrays of shape (blocks,), in the order of `blocks.names`.
            None where the noise was not measured, with a rule that does without (`pcr_core.needs_noise`).
        rule: any `pcr_core.Rule`.
        blocks: of `select_blocks`, or a selector of it.
        prior: with TemporalPrior, the last step's `report.prior`, at the first step `init_prior(params, blocks)`.
        layout: how gradients on a mesh are split, so that no inner product gathers one; see `make_train_step`.

    Returns:
        The update, each leaf in its gradients' dtype, and a Report. A block whose sums are not finite gets a non-finite
        update and `weights.finite` False; so does one whose update its dtype cannot hold.

    Raises:
        TypeError: leaves that are not floating (or float64 while x64 is off), statistics or a rule of another kind.
        ValueError: trees that do not match each other or `blocks`, TemporalPrior without `prior`, or a rule that needs
            the noise with statistics that lack it.

    Example:
        >>> import jax.numpy as jnp, pcr_core
        >>> p, s = {"w": jnp.asarray([4.0, 2.0])}, {"w": jnp.asarray([-1.0, 0.0])}
        >>> noise = pcr_core.Scatter(jnp.asarray([3.0]), jnp.asarray([0.0]), jnp.asarray([0.0]))
        >>> update, report = resolve(p, s, noise, pcr_core.PCR(alpha="variance"), blocks="all")
        >>> update["w"].tolist(), report.weights.alpha.tolist()  # S is certain: the conflicting component goes
        ([-1.0, 2.0], [1.0])
    """
    require_rule(rule)
    if is_temporal(rule) and prior is None:
        raise ValueError(
            "prior: TemporalPrior keeps state; give the last report.prior, at first init_prior(params, blocks)"
        )
    if not is_temporal(rule) and prior is not None:
        raise ValueError("prior: only PCR with TemporalPrior keeps state; drop the argument")
    check_floating(plasticity_grads, "plasticity_grads")
    check_floating(stability_grads, "stability_grads")
    chosen = blocks if isinstance(blocks, Blocks) else select_blocks(plasticity_grads, blocks)
    check_blocks(plasticity_grads, chosen, "plasticity_grads")
    check_blocks(stability_grads, chosen, "stability_grads")
    plasticity, structure = jax.tree.flatten(plasticity_grads)
    stability = jax.tree.leaves(stability_grads)
    for path, p, s in zip(chosen.paths, plasticity, stability, strict=True):
        if p.shape != s.shape:
            raise ValueError(f"stability_grads: {path} has shape {s.shape}, in plasticity_grads it has {p.shape}")
    dtypes = [jnp.promote_types(p.dtype, s.dtype) for p, s in zip(plasticity, stability, strict=True)]
    complete = _complete(statistics, plasticity, stability, chosen, layout)
    if is_temporal(rule):
        weights, plasticity, stability, prior = filtered(rule, complete, plasticity, stability, prior, chosen, layout)
    else:
        weights = rule(complete)
    both = weights.plasticity, weights.stability
    leaves = [
        _combine(p, s, None if block is None else [for_leaf(chosen, k, w, p.ndim) for w in both]).astype(dtype)
        for k, (block, p, s, dtype) in enumerate(zip(chosen.of_leaf, plasticity, stability, dtypes, strict=True))
    ]
    update = jax.tree.unflatten(structure, leaves)
    return update, as_written(Report(weights, complete, chosen, prior), update)


def as_written(report: Report, update: Any) -> Report:
    """The report, with `weights.finite` false as well where the update has left its dtype.

    float16 is read. What is wider holds any update whose norm it holds, and that needs no pass over the gradients - but
    with TemporalPrior, whose means' norms the statistics do not hold.
    """
    weights, statistics, blocks = report.weights, report.statistics, report.blocks
    longest = abs(weights.plasticity) * jnp.sqrt(statistics.plasticity_sq)
    longest += abs(weights.stability) * jnp.sqrt(statistics.stability_sq)
    leaves = jax.tree.leaves(update)
    lost = []  # (layers, 1) of each leaf, 1 where the update does not hold what it should
    for k in blocks.leaves:
        x, layers = leaves[k], jnp.asarray(blocks.of_layers(k))
        largest, axis = float(jnp.finfo(x.dtype).max), blocks.stack_axes[k]
        if largest < 1e30 or report.prior is not None:
            others = None if axis is None else tuple(at for at in range(x.ndim) if at != axis)
            left = ~jnp.isfinite(x).all(axis=others)
        elif largest < float(jnp.finfo(longest.dtype).max):  # else what is wide is not finite first
            left = longest[layers] > largest
        else:
            left = jnp.zeros(len(layers), bool)
        lost.append(left.reshape(-1, 1).astype(jnp.float32))
    finite = weights.finite & (by_block(blocks, lost)[:, 0] == 0)
    return replace(report, weights=replace(weights, finite=finite))


def _complete(
    statistics: Any, plasticity: list[Array], stability: list[Array], blocks: Blocks, layout: Layout | None
) -> BlockStatistics[Array]:
    if statistics is not None and not isinstance(statistics, (Scatter, BlockStatistics)):
        raise TypeError(
            f"statistics: expected a pcr_core.Scatter, BlockStatistics or None, got {type(statistics).__name__}"
        )
    expected = (len(blocks.names),)
    noise: Any = None if statistics is None else statistics.plasticity_var
    if noise is not None and tuple(noise.shape) != expected:
        got = tuple(noise.shape)
        raise ValueError(f"statistics: expected arrays of shape {expected}, one number a block, got {got}")
    check_floating(statistics, "statistics")
    statistics = jax.tree.map(jnp.asarray, statistics)
    if isinstance(statistics, BlockStatistics):
        complete: BlockStatistics[Array] = statistics
        return complete
    wide = wide_dtype()
    axes = () if layout is None else tuple(layout.mesh.axis_names)
    products = block_products(plasticity, stability, blocks, layout, axes)
    return BlockStatistics(
        plasticity_sq=products[0],
        stability_sq=products[1],
        dot=products[2],
        plasticity_var=None if statistics is None else statistics.plasticity_var.astype(wide),
        stability_var=None if statistics is None else statistics.stability_var.astype(wide),
        covariance=None if statistics is None else statistics.covariance.astype(wide),
        size=jnp.asarray(blocks.sizes, dtype=wide),
    )


def _combine(p: Array, s: Array, weights: Sequence[Array] | None) -> Array:
    dtype = jnp.promote_types(jnp.promote_types(p.dtype, s.dtype), jnp.float32)
    p, s = p.astype(dtype), s.astype(dtype)
    if weights is None:
        return p + s
    a, b = (w.astype(dtype) for w in weights)  # a float64 scalar would widen the whole leaf
    return a * p + b * s
