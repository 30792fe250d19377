"""The totals of both streams and nothing else, for steps in which the noise of the gradients is not measured.

One forward and two pullbacks of any model, by ordinary automatic differentiation. Below the first parameter of a block
both streams go back as one (`stages.py`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pcr_jax.blocks import Blocks
from pcr_jax.products import at_least_float32
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
) -> Pulled:
    leaves, structure = jax.tree.flatten(params)
    measured = set(blocks.leaves)

    def one_pass(totals: Any, rows: Any) -> Any:
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

        def model(*held: Array) -> list[Array]:
            whole = list(held) if layout is None else layout.gather(list(held))
            return [logp_fn(jax.tree.unflatten(structure, whole), flat)]

        stages = split(model, leaves, measured)
        carried, pull_lower, rest = jax.vjp(stages.lower, leaves, has_aux=True)
        logp, pull_upper = jax.vjp(lambda held, carried: stages.upper(held, carried, rest)[0], leaves, carried)
        w_p, w_s = both_cotangents(cotangents, logp, flat)
        # through the barrier, what both derive from the forward pass is made twice where it is used, not once and held
        (p, below_p), (s, below_s) = pull_upper(w_p), jax.lax.optimization_barrier(pull_upper)(w_s)
        below = pull_lower(jax.tree.map(jnp.add, below_p, below_s))[0]
        # no block is read below, where both streams are one
        plasticity = [
            at_least_float32(p[k])
            if k in measured
            else at_least_float32(p[k]) + at_least_float32(s[k]) + at_least_float32(below[k])
            for k in range(len(leaves))
        ]
        stability = {k: at_least_float32(s[k]) for k in measured}
        return add(totals, (plasticity, stability)), logp

    passes = jax.tree.map(lambda x: x.reshape(-1, groups_at_once, *x.shape[1:]), grouped)
    nothing = zeros_like(leaves)
    start = nothing, {k: nothing[k] for k in measured}
    (plasticity, stability), logp = jax.lax.scan(one_pass, start, passes)
    totals = plasticity, [stability.get(k, zero) for k, zero in enumerate(nothing)]
    return finish(structure, totals, logp, None, None, layout, "autograd")
