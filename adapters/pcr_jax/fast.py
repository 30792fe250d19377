"""The pullback of models whose block leaves are kernels of `dense`: both streams of whole groups at once.

What is kept for the products, x and both dy of each block kernel, belongs to the groups of one forward pass.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from pcr_jax.blocks import Blocks
from pcr_jax.dense import Probe, open_taps
from pcr_jax.products import at_least_float32, three
from pcr_jax.pullback import Cotangents, LogpFn, Pulled, add, both_cotangents, finish, zeros_like
from pcr_jax.sharding import Axes, Layout

Probes = dict[int, Probe]


def uncovered(
    logp_fn: LogpFn, params: Any, grouped: Any, groups_at_once: int, blocks: Blocks, layout: Layout | None
) -> tuple[str | None, Probes]:
    """Why the fast path cannot measure these blocks (None: it can), and the shapes of its probes by leaf."""
    leaves, structure = jax.tree.flatten(params)
    seen: dict[int, list[Probe]] = {}

    def run(leaves: list[Array], rows: Any) -> Array:
        with open_taps({id(leaves[k]): k for k in blocks.leaves}) as taps:
            logp = logp_fn(jax.tree.unflatten(structure, leaves), rows)
        seen.update(taps.seen)
        return logp

    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((groups_at_once * x.shape[1], *x.shape[2:]), x.dtype), grouped)
    n = jax.tree.leaves(rows)[0].shape[0]
    whole = leaves if layout is None else jax.eval_shape(layout.gather, leaves)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in whole]
    jaxpr = jax.make_jaxpr(run)(shapes, rows).jaxpr
    for k in blocks.leaves:
        path, calls = blocks.paths[k], seen.get(k, [])
        if not calls:
            return f"{path} did not reach pcr_jax.dense as it is (a cast, inside jit, scan or remat, or not at all)", {}
        if len(calls) > 1:
            return f"{path} passes through dense {len(calls)} times", {}
        users = [eqn for eqn in jaxpr.eqns if any(v is jaxpr.invars[k] for v in eqn.invars)]
        if len(users) != 1 or jaxpr.invars[k] in jaxpr.outvars:
            return f"{path} is used outside dense as well", {}
        if calls[0].x.shape[0] != n or not _reaches(jaxpr, users[0], calls[0].dy.shape):
            return f"the input of dense for {path} has no leading axis of responses (a vmapped or flattened model)", {}
    return None, {k: seen[k][0] for k in blocks.leaves}


def _reaches(jaxpr: Any, eqn: Any, shape: tuple[int, ...]) -> bool:
    """Whether the equation that uses a kernel, its cast aside, has a result of this shape."""
    while eqn.primitive.name == "convert_element_type":
        users = [e for e in jaxpr.eqns if any(v is eqn.outvars[0] for v in e.invars)]
        if len(users) != 1:
            return False
        eqn = users[0]
    return tuple(eqn.outvars[0].aval.shape) == tuple(shape)


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
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), probes)

    def one_pass(totals: Any, rows: Any) -> Any:
        group_size = jax.tree.leaves(rows)[0].shape[1]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

        def model(held: list[Array], probes: Probes) -> Array:
            leaves = held if layout is None else layout.gather(held)
            with open_taps({id(leaves[k]): k for k in measured}, probes):
                return logp_fn(jax.tree.unflatten(structure, leaves), flat)

        logp, pull = jax.vjp(model, leaves, zeros)
        # the kernels' own gradients are replaced below, so the compiler drops the products they would take
        (plasticity, taps_p), (stability, taps_s) = (pull(w) for w in both_cotangents(cotangents, logp, flat))
        streams: tuple[list[Any], list[Any]] = (list(plasticity), list(stability))
        response: list[Any] = [0.0] * len(blocks.names)
        stratum: list[Any] = [0.0] * len(blocks.names)
        for k in measured:
            block = blocks.of_leaf[k]
            assert block is not None
            x, dp, ds = taps_p[k].x, taps_p[k].dy, taps_s[k].dy
            totals_of_k, r, q = _split_products(k, x, dp, ds, group_size, layout, axes)
            for stream, total in zip(streams, totals_of_k, strict=True):
                stream[k] = total if layout is None else layout.scatter(k, total)
            response[block], stratum[block] = response[block] + r, stratum[block] + q
        products = jnp.stack(response, axis=-1), jnp.stack(stratum, axis=-1)
        return add(totals, streams), (*products, logp)

    passes = jax.tree.map(lambda x: x.reshape(-1, groups_at_once, *x.shape[1:]), grouped)
    nothing = (zeros_like(leaves), zeros_like(leaves))
    totals, (response, stratum, logp) = jax.lax.scan(one_pass, nothing, passes)
    if axes:  # one sum for all responses and blocks
        response, stratum = jnp.sum(response, axis=1), jnp.sum(stratum, axis=1)
    return finish(structure, totals, logp, response, stratum, layout)


def _split_products(
    leaf: int, x: Array, dp: Array, ds: Array, group_size: int, layout: Layout | None, axes: Axes
) -> tuple[tuple[Array, Array], Array, Array]:
    """`kernel_products` of a kernel that is split over mesh axes: the products as (shards, ...) terms of a sum."""
    if layout is None or not axes:
        return kernel_products(x, dp, ds, group_size)
    rows, columns = (*layout.spec(leaf, axes), None, None)[:2]
    leading = [None] * (x.ndim - 1)
    inputs, outputs = PartitionSpec(*leading, rows), PartitionSpec(*leading, columns)

    def part(x: Array, dp: Array, ds: Array) -> Any:
        totals, *products = kernel_products(x, dp, ds, group_size)
        return totals, *(layout.once(leaf, t, axes)[None] for t in products)

    split = (PartitionSpec(rows, columns),) * 2, PartitionSpec(axes), PartitionSpec(axes)
    result: tuple[tuple[Array, Array], Array, Array] = layout.by_part(part, axes, (inputs, outputs, outputs), split)(
        x, dp, ds
    )
    return result


def kernel_products(x: Array, dp: Array, ds: Array, group_size: int) -> tuple[tuple[Array, Array], Array, Array]:
    """Both totals of a kernel's gradient, with inner products of its per-response and per-group parts.

    Args:
        x: (n, ..., in).
        dp, ds: (n, ..., out) the two streams' gradients of the output.
        group_size: responses next to each other that form a group.

    Returns:
        ((in, out), (in, out)), (n, 3) and (n / group_size, 3), the products being p.p, s.s, p.s.
    """
    rows = [t.reshape(-1, group_size, _tokens(t), t.shape[-1]) for t in (x, dp, ds)]
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    nothing = (jnp.zeros((x.shape[-1], dp.shape[-1]), accumulate),) * 2

    def one_response(sums: Any, row: Any) -> Any:
        x, *dys = row
        p, s = (at_least_float32(jnp.matmul(x.T, dy, preferred_element_type=accumulate)) for dy in dys)
        return add(sums, (p, s)), three(p, s)

    def one_group(totals: Any, rows: Any) -> Any:
        sums, products = jax.lax.scan(one_response, nothing, rows)
        return add(totals, sums), (products, three(*sums))

    totals, (response, stratum) = jax.lax.scan(one_group, nothing, tuple(rows))
    return totals, response.reshape(-1, 3), stratum


def _tokens(t: Array) -> int:
    count = 1
    for length in t.shape[1:-1]:
        count *= length
    return count
