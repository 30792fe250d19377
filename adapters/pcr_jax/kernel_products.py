"""Inner products of the per-response gradients of kernels, made of their inputs and both streams' output gradients.

On a CPU each response's gradient is formed, multiplied and added to its group's before the next one, some rows at a
time where these stay in a core's cache. On an accelerator that would be many short steps; there one batched product
forms the gradients of all responses, of as many kernels, or of as many rows of one, as memory allows.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from pcr_jax.products import three, three_of_rows

Products: TypeAlias = tuple[tuple[Array, Array], Array, Array]
_TILE = 3 << 16  # numbers of a response's gradient that a core's cache holds, with those of its group
_FEWEST_ROWS = 96  # of a tile: with fewer, the matrix product itself is slow
_UNROLL = 4  # responses of a tile whose gradients are added in one go
_HELD = 1 << 28  # numbers of per-response gradients that an accelerator holds at a time


def kernel_products(x: Array, dp: Array, ds: Array, group_size: int, *, whole: bool) -> Products:
    """Both totals of each kernel's gradient, with inner products of its per-response and per-group parts.

    Args:
        x: (kernels, n, tokens, in).
        dp, ds: (kernels, n, tokens, out) the two streams' gradients of the output.
        group_size: responses next to each other that form a group.
        whole: whether the arrays are in one piece, see `products.in_one_piece`.

    Returns:
        (kernels, in, out) of each stream, (kernels, n, 3) and (kernels, n / group_size, 3), where the last axis holds
        p.p, s.s and p.s.
    """
    one_by_one = partial(_one_by_one, group_size=group_size, whole=whole)
    products: Products = jax.lax.platform_dependent(
        x, dp, ds, cpu=one_by_one, default=partial(_in_batches, group_size=group_size)
    )
    return products


def _one_by_one(x: Array, dp: Array, ds: Array, group_size: int, whole: bool) -> Products:
    accumulate, inputs = jnp.promote_types(x.dtype, jnp.float32), x.shape[-1]
    rows = _tile_rows(inputs, dp.shape[-1])
    unroll = _UNROLL if rows < inputs else 1
    nothing = (jnp.zeros((rows, dp.shape[-1]), accumulate),) * 2

    def one_response(sums: Any, row: Any) -> Any:
        x, *dys = row
        p, s = (jnp.matmul(x.T, dy, preferred_element_type=accumulate) for dy in dys)
        return jax.tree.map(jnp.add, sums, (p, s)), three(p, s, whole=whole)

    def one_group(totals: Any, rows: Any) -> Any:
        sums, products = jax.lax.scan(one_response, nothing, rows, unroll=unroll)
        # once a group, a slower sum that compiles sooner
        return jax.tree.map(jnp.add, totals, sums), (products, three_of_rows(*sums, leading=0))

    def one_kernel(operands: Any) -> Products:
        tiles, dp, ds = operands

        def one_tile(x: Array) -> Products:
            totals, (response, stratum) = jax.lax.scan(one_group, nothing, (x, dp, ds))
            return totals, response.reshape(-1, 3), stratum

        (p, s), response, stratum = _of_each(one_tile, tiles)
        p, s = (t.reshape(-1, t.shape[-1])[:inputs] for t in (p, s))
        return (p, s), response.sum(0), stratum.sum(0)

    x, dp, ds = (t.reshape(t.shape[0], -1, group_size, *t.shape[2:]) for t in (x, dp, ds))
    x = jnp.pad(x, ((0, 0),) * 4 + ((0, -inputs % rows),))
    tiles = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, rows), -2, 1)
    products: Products = _of_each(one_kernel, (tiles, dp, ds))
    return products


def _tile_rows(inputs: int, outputs: int) -> int:
    """Rows of a kernel whose gradient is formed at a time: those that a core's cache holds, if these are not few."""
    most = _TILE // outputs
    if most < _FEWEST_ROWS or inputs <= most:
        return inputs
    return -(-inputs // -(-inputs // most))


def _in_batches(x: Array, dp: Array, ds: Array, group_size: int) -> Products:
    kernels, n, _, inputs = x.shape
    each = 2 * n * inputs * dp.shape[-1]
    if kernels * each > _HELD and kernels > 1:

        def one_kernel(rows: tuple[Array, Array, Array]) -> Products:
            x, dp, ds = (t[None] for t in rows)
            products: Products = jax.tree.map(lambda t: t[0], _in_batches(x, dp, ds, group_size))
            return products

        products: Products = _of_each(one_kernel, (x, dp, ds), at_once=max(1, _HELD // each))
        return products
    pieces = min(inputs, -(-each // _HELD))
    parts = [
        _batched(rows, dp, ds, group_size)
        for rows in jnp.split(x, [inputs * k // pieces for k in range(1, pieces)], axis=-1)
    ]
    p, s = (jnp.concatenate(stream, axis=1) for stream in zip(*(part[0] for part in parts), strict=True))
    response, stratum = (jnp.stack([part[k] for part in parts]).sum(0) for k in (1, 2))
    return (p, s), response, stratum


def _batched(x: Array, dp: Array, ds: Array, group_size: int) -> Products:
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    p, s = (jnp.einsum("knti,knto->knio", x, dy, preferred_element_type=accumulate) for dy in (dp, ds))
    groups = [t.reshape(t.shape[0], -1, group_size, *t.shape[2:]).sum(2) for t in (p, s)]
    totals = groups[0].sum(1), groups[1].sum(1)
    return totals, three_of_rows(p, s, leading=2), three_of_rows(*groups, leading=2)


def _of_each(function: Any, operands: Any, at_once: int | None = None) -> Any:
    if jax.tree.leaves(operands)[0].shape[0] > 1:
        return jax.lax.map(function, operands, batch_size=at_once)
    return jax.tree.map(lambda t: t[None], function(jax.tree.map(lambda t: t[0], operands)))
