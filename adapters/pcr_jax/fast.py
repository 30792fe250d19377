"""The pullback of models whose block leaves are kernels of `dense`: both streams of whole groups at once.

What is kept for the products, x and both dy of each kernel, belongs to the groups of one forward pass. Before the first
block kernel both streams go back as one (`stages.py`); of kernels outside the blocks their sum's gradient is formed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from pcr_jax.blocks import Blocks
from pcr_jax.dense import Probe, open_taps
from pcr_jax.products import at_least_float32, in_one_piece, three
from pcr_jax.pullback import Cotangents, LogpFn, Pulled, add, both_cotangents, finish, zeros_like
from pcr_jax.sharding import Axes, Layout
from pcr_jax.stages import split

Probes = dict[int, Probe]
_TILE = 3 << 16  # numbers of a response's gradient that are formed at a time, and stay in a core's cache
_UNROLL = 4  # responses whose gradients are added in one go


def uncovered(
    logp_fn: LogpFn, params: Any, grouped: Any, groups_at_once: int, blocks: Blocks, layout: Layout | None
) -> tuple[str | None, Probes]:
    """Why the fast path cannot measure these blocks (None: it can), and the shapes of its probes by leaf.

    Kernels outside the blocks that pass through `dense` in the same way are probed as well.
    """
    leaves, structure = jax.tree.flatten(params)
    seen: dict[int, list[Probe]] = {}
    # of a sharded model only the blocks, whose products know how to lie
    kernels = [k for k, x in enumerate(leaves) if x.ndim == 2] if layout is None else blocks.leaves

    def run(leaves: list[Array], rows: Any) -> Array:
        with open_taps({id(leaves[k]): k for k in kernels}) as taps:
            logp = logp_fn(jax.tree.unflatten(structure, leaves), rows)
        seen.update(taps.seen)
        return logp

    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((groups_at_once * x.shape[1], *x.shape[2:]), x.dtype), grouped)
    n = jax.tree.leaves(rows)[0].shape[0]
    whole = leaves if layout is None else jax.eval_shape(layout.gather, leaves)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in whole]
    jaxpr = jax.make_jaxpr(run)(shapes, rows).jaxpr
    faults = {k: _fault(jaxpr, k, blocks.paths[k], seen.get(k, []), n) for k in {*kernels, *blocks.leaves}}
    for k in blocks.leaves:
        if faults[k] is not None:
            return faults[k], {}
    return None, {k: seen[k][0] for k, fault in faults.items() if fault is None}


def _fault(jaxpr: Any, leaf: int, path: str, calls: list[Probe], n: int) -> str | None:
    if not calls:
        return f"{path} did not reach pcr_jax.dense as it is (a cast, inside jit, scan or remat, or not at all)"
    if len(calls) > 1:
        return f"{path} passes through dense {len(calls)} times"
    var = jaxpr.invars[leaf]
    users = [eqn for eqn in jaxpr.eqns if any(v is var for v in eqn.invars)]
    if len(users) != 1 or any(v is var for v in jaxpr.outvars):
        return f"{path} is used outside dense as well"
    product = _product(jaxpr, users[0])
    if product is None:  # inside, it may be run any number of times, and in any branch
        return f"{path} passes through dense inside scan, jit, remat or cond, which close over it"
    if calls[0].x.shape[0] != n or tuple(product.outvars[0].aval.shape) != tuple(calls[0].dy.shape):
        return f"the input of dense for {path} has no leading axis of responses (a vmapped or flattened model)"
    return None


def _product(jaxpr: Any, eqn: Any) -> Any | None:
    """The matrix product that an equation is, or casts a kernel for; None where it is something else."""
    while eqn.primitive.name == "convert_element_type":
        users = [e for e in jaxpr.eqns if any(v is eqn.outvars[0] for v in e.invars)]
        if len(users) != 1:
            return None
        eqn = users[0]
    return eqn if eqn.primitive.name == "dot_general" else None


def pull_fast(
    logp_fn: LogpFn,
    params: Any,
    grouped: Any,
    cotangents: Cotangents,
    groups_at_once: int,
    blocks: Blocks,
    probes: Probes,
    layout: Layout | None,
) -> Pulled:
    leaves, structure = jax.tree.flatten(params)
    measured = blocks.leaves
    axes = () if layout is None else layout.model_axes(measured)
    flat_zeros, probed = jax.tree.flatten(jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), probes))
    # of each flat input of the model: the leaf that it is a probe of
    place = [None] * len(leaves) + [k for k in sorted(probes) for _ in range(2)]

    def one_pass(totals: Any, rows: Any) -> Any:
        group_size = jax.tree.leaves(rows)[0].shape[1]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

        def model(*inputs: Any) -> list[Array]:
            held, taps = list(inputs[: len(leaves)]), jax.tree.unflatten(probed, inputs[len(leaves) :])
            whole = held if layout is None else layout.gather(held)
            with open_taps({id(whole[k]): k for k in taps}, taps):
                return [logp_fn(jax.tree.unflatten(structure, whole), flat)]

        stages = split(model, [*leaves, *flat_zeros], [k for k, leaf in enumerate(place) if leaf in measured])
        carried, pull_lower, rest = jax.vjp(lambda x: stages.lower([*x, *flat_zeros]), leaves, has_aux=True)
        logp, pull_upper = jax.vjp(lambda *x: stages.upper([*x[0], *x[1]], x[2], rest)[0], leaves, flat_zeros, carried)
        w_p, w_s = both_cotangents(cotangents, logp, flat)
        # through the barrier, what both derive from the forward pass is made twice where it is used, not once and held
        pulls = [pull_upper(w_p), jax.lax.optimization_barrier(pull_upper)(w_s)]
        taps_p, taps_s = (jax.tree.unflatten(probed, taps) for _, taps, _ in pulls)
        below = pull_lower(jax.tree.map(jnp.add, pulls[0][2], pulls[1][2]))[0]
        # gradients of probed kernels are replaced below, so the compiler drops the products they would take
        summed = [sum(map(at_least_float32, parts)) for parts in zip(pulls[0][0], pulls[1][0], below, strict=True)]
        above = {place[k] for k in stages.read_above}
        stability: dict[int, Array] = {}
        response: list[Any] = [0.0] * len(blocks.names)
        stratum: list[Any] = [0.0] * len(blocks.names)
        for k in probes:
            x, dp, ds = taps_p[k].x, taps_p[k].dy, taps_s[k].dy
            block = blocks.of_leaf[k]
            if block is None:
                if k in above:
                    summed[k] = _kernel_gradient(x, dp + ds)
                continue
            (p, s), r, q = _split_products(k, x, dp, ds, group_size, layout, axes)
            summed[k], stability[k] = (t if layout is None else layout.scatter(k, t) for t in (p, s))
            response[block], stratum[block] = response[block] + r, stratum[block] + q
        products = jnp.stack(response, axis=-1), jnp.stack(stratum, axis=-1)
        return add(totals, (summed, stability)), (*products, logp)

    passes = jax.tree.map(lambda x: x.reshape(-1, groups_at_once, *x.shape[1:]), grouped)
    nothing = zeros_like(leaves)
    start = nothing, {k: nothing[k] for k in measured}
    (plasticity, stability), (response, stratum, logp) = jax.lax.scan(one_pass, start, passes)
    totals = plasticity, [stability.get(k, zero) for k, zero in enumerate(nothing)]
    if axes:  # one sum for all responses and blocks
        response, stratum = jnp.sum(response, axis=1), jnp.sum(stratum, axis=1)
    return finish(structure, totals, logp, response, stratum, layout, "fast")


def _split_products(
    leaf: int, x: Array, dp: Array, ds: Array, group_size: int, layout: Layout | None, axes: Axes
) -> tuple[tuple[Array, Array], Array, Array]:
    """`kernel_products` of a kernel that is split over mesh axes: the products as (shards, ...) terms of a sum."""
    if layout is None or not axes:
        return kernel_products(x, dp, ds, group_size, whole=in_one_piece(layout))
    rows, columns = (*layout.spec(leaf, axes), None, None)[:2]
    leading = [None] * (x.ndim - 1)
    inputs, outputs = PartitionSpec(*leading, rows), PartitionSpec(*leading, columns)

    def part(x: Array, dp: Array, ds: Array) -> Any:
        totals, *products = kernel_products(x, dp, ds, group_size, whole=True)
        return totals, *(layout.once(leaf, t, axes)[None] for t in products)

    split = (PartitionSpec(rows, columns),) * 2, PartitionSpec(axes), PartitionSpec(axes)
    result: tuple[tuple[Array, Array], Array, Array] = layout.by_part(part, axes, (inputs, outputs, outputs), split)(
        x, dp, ds
    )
    return result


def _kernel_gradient(x: Array, dy: Array) -> Array:
    rows, outputs = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return jnp.matmul(rows.T, outputs, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def kernel_products(
    x: Array, dp: Array, ds: Array, group_size: int, *, whole: bool
) -> tuple[tuple[Array, Array], Array, Array]:
    """Both totals of a kernel's gradient, with inner products of its per-response and per-group parts.

    Args:
        x: (n, ..., in).
        dp, ds: (n, ..., out) the two streams' gradients of the output.
        group_size: responses next to each other that form a group.
        whole: whether the arrays are in one piece, see `products.in_one_piece`.

    Returns:
        ((in, out), (in, out)), (n, 3) and (n / group_size, 3), the products being p.p, s.s, p.s.
    """
    rows = tuple(t.reshape(-1, group_size, _tokens(t), t.shape[-1]) for t in (x, dp, ds))
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    width = _tile_width(x.shape[-1], dp.shape[-1])
    nothing = (jnp.zeros((width, dp.shape[-1]), accumulate),) * 2

    def one_tile(totals: tuple[Array, Array], tile: Array) -> Any:
        def one_response(sums: Any, row: Any) -> Any:
            x, *dys = row
            x = jax.lax.dynamic_slice_in_dim(x, tile * width, width, axis=1)
            p, s = (at_least_float32(jnp.matmul(x.T, dy, preferred_element_type=accumulate)) for dy in dys)
            return add(sums, (p, s)), three(p, s, whole=whole)

        def one_group(totals: Any, rows: Any) -> Any:
            sums, products = jax.lax.scan(one_response, nothing, rows, unroll=min(group_size, _UNROLL))
            return add(totals, sums), (products, three(*sums, whole=whole))

        parts, products = jax.lax.scan(one_group, nothing, rows)
        put = jax.lax.dynamic_update_slice_in_dim
        p, s = (put(total, part, tile * width, axis=0) for total, part in zip(totals, parts, strict=True))
        return (p, s), products

    shape = x.shape[-1], dp.shape[-1]
    # overwritten by the tiles; made of dp, since XLA makes constants long before they are needed, and holds them
    start = tuple(jnp.broadcast_to(dy.reshape(-1)[0], shape).astype(accumulate) for dy in (dp, ds))
    totals, (response, stratum) = jax.lax.scan(one_tile, start, jnp.arange(shape[0] // width))
    return totals, response.sum(axis=0).reshape(-1, 3), stratum.sum(axis=0)


def _tile_width(inputs: int, outputs: int) -> int:
    """Rows of the kernel that are taken at a time: the most that divide it and stay in a core's cache."""
    most = max(1, _TILE // outputs)
    return max(width for width in range(1, min(most, inputs) + 1) if inputs % width == 0)


def _tokens(t: Array) -> int:
    count = 1
    for length in t.shape[1:-1]:
        count *= length
    return count
