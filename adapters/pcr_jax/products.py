"""Inner products of gradients: float64 where x64 is on, else float32 in many partial sums.

Those err by 1e-7 of |a||b| as a rule, and by some 1e-6 where all terms are equal and round alike.

How XLA orders a sum is its own affair, so the partial sums are spelled out: parts of the last axis, which leave a
sharding as it is and which an accelerator fuses with the products; or, on a CPU, one for each of many lanes, in a loop
that reads both gradients once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from pcr_jax.blocks import Blocks
from pcr_jax.sharding import Axes, Layout

_PART = 128
_CACHED = 1 << 20  # numbers that a CPU's cache holds, so that it may read them once for each product
_LANES = (1 << 13) + 64  # no power of two, at which all terms of a lane would want the same lines of the first cache
_AT_ONCE = 4  # terms of a lane that are read in a turn of the loop; with them, what a core's cache holds
_RUN = 16  # turns that a lane adds before its sum is added to others: equal terms round alike in all lanes


def wide_dtype() -> Any:
    """float64 where x64 is on, else float32."""
    return jnp.result_type(float)


def at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _short_sums(x: Array) -> Array:
    """(..., k) -> (..., parts), sums of at most _PART neighbours along the last axis, which keeps a sharding intact."""
    x = jnp.atleast_1d(x)
    width = x.shape[-1]
    whole = width // _PART * _PART
    parts = []
    if whole:
        parts.append(jnp.sum(x[..., :whole].reshape(*x.shape[:-1], -1, _PART), axis=-1))
    if whole < width:
        parts.append(jnp.sum(x[..., whole:], axis=-1, keepdims=True))
    # without the barrier XLA merges a sum of sums into one long sum
    return jax.lax.optimization_barrier(jnp.concatenate(parts, axis=-1))


def in_one_piece(layout: Layout | None) -> bool:
    """Whether arrays lie on one device as they are: there is but one, or a layout says how they are split."""
    return layout is not None or jax.device_count() == 1


def three(p: Array, s: Array, *, whole: bool) -> Array:
    """(3,) p.p, s.s and p.s; `whole`: of arrays that are in one piece."""
    if not whole:
        return three_of_rows(p, s, leading=0)
    p, s = p.reshape(-1), s.reshape(-1)
    if p.size < _CACHED:
        return three_of_rows(p, s, leading=0)
    products: Array = jax.lax.platform_dependent(p, s, cpu=_three_in_lanes, default=partial(three_of_rows, leading=0))
    return products


@partial(jax.jit, static_argnames="leading")
def three_of_rows(p: Array, s: Array, leading: int) -> Array:
    """(..., 3) p.p, s.s and p.s over all but some leading axes, by reductions that XLA fuses with the products."""
    wide = wide_dtype()
    p, s = p.astype(wide), s.astype(wide)
    terms = [p * p, s * s, p * s]
    while wide != jnp.float64 and terms[0].size > _PART * math.prod(terms[0].shape[:leading]):
        terms = [t.reshape(*t.shape[:leading], -1) for t in map(_short_sums, terms)]
    return jnp.stack([t.reshape(*t.shape[:leading], -1).sum(-1) for t in terms], axis=-1)


def _three_in_lanes(p: Array, s: Array) -> Array:
    """On a CPU: one reading of both arrays, with sums that stay in a core's cache."""
    wide = wide_dtype()
    p, s = p.reshape(-1), s.reshape(-1)
    turn = _LANES * _AT_ONCE
    turns = p.size // turn
    nothing = (jnp.zeros(_LANES, wide),) * 3

    def one_turn(k: Array, sums: Any) -> Any:
        # slices of a lane's width, which XLA fuses with the sums; in pairs, not one after the other
        starts = [k * turn + j * _LANES for j in range(_AT_ONCE)]
        a, b = ([jax.lax.dynamic_slice(x, (start,), (_LANES,)).astype(wide) for start in starts] for x in (p, s))
        pairs = (a, a), (b, b), (a, b)
        return tuple(
            t + _pairwise([x * y for x, y in zip(*pair, strict=True)]) for t, pair in zip(sums, pairs, strict=True)
        )

    def one_run(k: Array, sums: Any) -> Any:
        run = jax.lax.fori_loop(k * _RUN, jnp.minimum((k + 1) * _RUN, turns), one_turn, nothing)
        return jax.tree.map(jnp.add, sums, run)

    short = turns <= 2 * _RUN
    lanes = jax.lax.fori_loop(0, *((turns, one_turn) if short else (-(-turns // _RUN), one_run)), nothing)
    total = _sum_of_sums(jnp.stack(lanes))
    if turns * turn < p.size:
        a, b = (jnp.pad(x[turns * turn :].astype(wide), (0, -x.size % _PART)) for x in (p, s))
        total += _sum_of_sums(jnp.stack([a * a, b * b, a * b]))
    return total


def _sum_of_sums(x: Array) -> Array:
    """(k, n) -> (k,) where _PART, or half of it, divides n, and n / _PART is not much."""
    part = _PART if x.shape[1] % _PART == 0 else _PART // 2
    # without the barrier XLA merges a sum of sums into one long sum
    return jax.lax.optimization_barrier(x.reshape(len(x), part, -1).sum(-1)).sum(-1)


def _pairwise(terms: Sequence[Array]) -> Array:
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def block_products(
    plasticity: Sequence[Array],
    stability: Sequence[Array],
    blocks: Blocks,
    layout: Layout | None = None,
    axes: Axes = (),
) -> Array:
    """(3, blocks) |p|^2, |s|^2 and p.s of two gradients, given as all leaves of the tree.

    With a layout: of leaves that are split over these mesh axes; each shard takes the products of its own part.
    """
    leaves = blocks.leaves
    streams = [plasticity[k] for k in leaves], [stability[k] for k in leaves]
    used = () if layout is None else tuple(a for a in axes if any(layout.axes_of(k, (a,)) for k in leaves))

    def part(plasticity: Sequence[Array], stability: Sequence[Array]) -> Array:
        products = []
        for k, p, s in zip(leaves, plasticity, stability, strict=True):
            axis, layers = blocks.stack_axes[k], len(blocks.of_layers(k))
            each = _three_of_layers(p, s, axis, whole=in_one_piece(layout))
            if layout is not None:
                each = layout.once(k, each if axis is None else layout.placed(k, axis, each, layers, used), used)
            products.append(each)
        total = by_block(blocks, products)
        return jax.lax.psum(total, used) if used else total

    if layout is None or not used:
        return part(*streams).T
    specs = [layout.spec(k, used) for k in leaves]
    products: Array = layout.by_part(part, used, (specs, specs), PartitionSpec())(*streams)
    return products.T


def by_block(blocks: Blocks, of_leaves: Sequence[Array]) -> Array:
    """Sums over what lies in a block, of (layers, ...) for each leaf of `blocks.leaves` -> (blocks, ...)."""
    terms = jnp.concatenate(of_leaves)
    members: list[list[int]] = [[] for _ in blocks.names]
    for row, block in enumerate(block for k in blocks.leaves for block in blocks.of_layers(k)):
        members[block].append(row)
    if members == [[row] for row in range(len(members))]:
        return terms
    # not a scatter, which on accelerators adds in any order: a row of zeros fills up blocks of fewer terms
    most = max(map(len, members))
    index = [[*rows, *[len(terms)] * (most - len(rows))] for rows in members]
    filled = jnp.concatenate([terms, jnp.zeros_like(terms[:1])])
    return filled[jnp.asarray(index)].sum(axis=1)


def for_leaf(blocks: Blocks, leaf: int, values: Array, ndim: int) -> Array:
    """Of one value a block, those of a leaf's blocks, to broadcast against the leaf."""
    layers, axis = blocks.of_layers(leaf), blocks.stack_axes[leaf]
    if axis is None:
        return values[layers[0]]
    return values[jnp.asarray(layers)].reshape([-1 if at == axis else 1 for at in range(ndim)])


def _three_of_layers(p: Array, s: Array, axis: int | None, *, whole: bool) -> Array:
    """(layers, 3) of a stack along an axis, (1, 3) of a leaf that is none."""
    if axis is None:
        return three(p, s, whole=whole)[None]

    def one_by_one(p: Array, s: Array) -> Array:
        def one(layer: Array) -> Array:
            parts = (jax.lax.dynamic_index_in_dim(x, layer, axis, keepdims=False) for x in (p, s))
            return three(*parts, whole=whole)

        products: Array = jax.lax.map(one, jnp.arange(p.shape[axis]))
        return products

    def together(p: Array, s: Array) -> Array:
        return three_of_rows(*(jnp.moveaxis(x, axis, 0) for x in (p, s)), leading=1)

    if not whole:
        return together(p, s)
    products: Array = jax.lax.platform_dependent(p, s, cpu=one_by_one, default=together)
    return products
