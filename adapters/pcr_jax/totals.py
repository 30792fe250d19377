"""The totals of both streams over all microbatches, with or without the noise: one forward pass and two pullbacks each.

One pullback is of the smaller stream alone, and goes no lower than the lowest parameter of a block (`stages.py`); the
other is of the sum of both, which is the plain gradient and all that parameters outside the blocks need. The larger
stream is the difference: it loses nothing by that, as it would if it were the smaller one. Where the noise is measured,
both pullbacks also bring what the products of single responses are made of (`fast.py`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pcr_jax.blocks import Blocks
from pcr_jax.fast import Extras, Measured
from pcr_jax.products import at_least_float32, by_block
from pcr_jax.pullback import Cotangents, LogpFn, Pulled, add, both_cotangents, finish, zeros_like
from pcr_jax.sharding import Layout
from pcr_jax.stages import split


def pull_totals(
    logp_fn: LogpFn,
    params: Any,
    grouped: Any,
    cotangents: Cotangents,
    groups_at_once: int,
    blocks: Blocks,
    layout: Layout | None,
    measured: Measured | None = None,
) -> Pulled:
    """Of any model without the noise; with it, of one that `fast.measure` took."""
    leaves, structure = jax.tree.flatten(params)
    axes = () if layout is None or measured is None else layout.model_axes(blocks.leaves)
    by_autodiff = [k for k in range(len(leaves)) if measured is None or k not in blocks.leaves]

    def one_pass(totals: Any, rows: Any) -> Any:
        group_size = jax.tree.leaves(rows)[0].shape[1]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        n = jax.tree.leaves(flat)[0].shape[0]
        held = leaves if layout is None else layout.gather(leaves)
        extras, of_extras = jax.tree.flatten(Extras({}, {}) if measured is None else measured.extras(held, n))

        def model(*inputs: Array) -> list[Array]:
            held, extras = list(inputs[: len(leaves)]), inputs[len(leaves) :]
            held = held if layout is None else layout.gather(held)
            if measured is None:
                return [logp_fn(jax.tree.unflatten(structure, held), flat)]
            return [measured.logp(held, jax.tree.unflatten(of_extras, extras), flat)]

        read_in_blocks = [*blocks.leaves, *range(len(leaves), len(leaves) + len(extras))]
        stages = split(model, [*leaves, *extras], read_in_blocks)
        carried, pull_lower, rest = jax.vjp(lambda held: stages.lower([*held, *extras]), leaves, has_aux=True)
        logp, pull_upper = jax.vjp(
            lambda held, extras, carried: stages.upper([*held, *extras], carried, rest)[0], leaves, extras, carried
        )
        w_p, w_s = both_cotangents(cotangents, logp, flat)
        p_is_larger = jnp.sum(jnp.square(w_p)) >= jnp.sum(jnp.square(w_s))
        smaller, of_smaller, _ = pull_upper(jnp.where(p_is_larger, w_s, w_p))
        # through the barrier, what both derive from the forward pass is made twice where it is used, not once and held
        joint, of_joint, below = jax.lax.optimization_barrier(pull_upper)(w_p + w_s)
        (lowest,) = pull_lower(below)

        def streams(larger: Array, smaller: Array) -> tuple[Array, Array]:
            return jnp.where(p_is_larger, larger, smaller), jnp.where(p_is_larger, smaller, larger)

        plasticity, stability = [jnp.zeros(())] * len(leaves), {}
        for k in by_autodiff:
            whole = at_least_float32(joint[k])
            if k not in blocks.leaves:  # below the blocks both streams are one
                plasticity[k] = whole + at_least_float32(lowest[k])
                continue
            part = at_least_float32(smaller[k])
            plasticity[k], stability[k] = streams(whole - part, part)
        if measured is not None:
            both = (jax.tree.unflatten(of_extras, parts) for parts in (of_joint, of_smaller))
            joint_extras, smaller_extras = both
            response, stratum = [], []  # (layers, terms, rows, 3) of each leaf
            for k in blocks.leaves:
                (large, small), r, q = measured.products(k, joint_extras, smaller_extras, group_size, layout, axes)
                if layout is not None:
                    large, small = layout.scatter(k, large), layout.scatter(k, small)
                plasticity[k], stability[k] = streams(large, small)
                response.append(r)
                stratum.append(q)
            r, q = (jnp.moveaxis(by_block(blocks, t), 0, -1) for t in (response, stratum))  # (terms, rows, 3, blocks)
            swapped = jnp.asarray([1, 0, 2])
            products = tuple(jnp.where(p_is_larger, t, t[:, :, swapped]) for t in (r, q))
            return add(totals, (plasticity, stability)), (*products, logp)
        return add(totals, (plasticity, stability)), (None, None, logp)

    passes = jax.tree.map(lambda x: x.reshape(-1, groups_at_once, *x.shape[1:]), grouped)
    nothing = zeros_like(leaves)
    start = nothing, {k: nothing[k] for k in blocks.leaves}
    (plasticity, stability), (response, stratum, logp) = jax.lax.scan(one_pass, start, passes)
    totals = plasticity, [stability.get(k, zero) for k, zero in enumerate(nothing)]
    if measured is None:
        return finish(structure, totals, logp, None, None, layout, "autograd")
    # one sum for all responses and blocks, over the parts of what is split over a mesh
    return finish(structure, totals, logp, response.sum(axis=1), stratum.sum(axis=1), layout, "fast")
