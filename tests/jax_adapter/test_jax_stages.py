"""A traced function in two stages, and what it saves: below the first block both streams are one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from pcr_jax import pullback, select_blocks
from pcr_jax.stages import split


def test_the_stages_make_the_whole() -> None:
    def function(a: Any, b: Any, c: Any) -> Any:
        order = jnp.argsort(a)
        h = jnp.sin(a) * b
        return [(h * c)[order] + a, jax.jit(jnp.cumsum)(h)]

    a, b, c = (jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32)[k] for k in range(3))
    stages = split(function, [a, b, c], [2])
    carried, rest = stages.lower([a, b, c])
    assert [x.dtype for x in carried] == [jnp.float32]
    assert [x.dtype for x in rest] == [jnp.int32]
    assert stages.read_above == {0, 2}
    for got, expected in zip(stages.upper([a, b, c], carried, rest), function(a, b, c), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_what_is_read_first_leaves_nothing_below() -> None:
    stages = split(lambda x: [2 * x], [jnp.ones(3)], [0])
    assert stages.lower([jnp.ones(3)]) == ([], [])
    np.testing.assert_array_equal(stages.upper([jnp.ones(3)], [], [])[0], 2 * jnp.ones(3))


def test_a_function_that_is_jitted_as_a_whole_is_cut_inside() -> None:
    def function(a: Any, b: Any) -> Any:
        return [jnp.cos(jnp.sin(a)) * b]

    a, b = jnp.arange(3.0), jnp.ones(3)
    stages = split(jax.jit(jax.jit(function)), [a, b], [1])
    carried, rest = stages.lower([a, b])
    assert stages.read_above == {1}
    np.testing.assert_array_equal(stages.upper([a, b], carried, rest)[0], function(a, b)[0])


def _flops(blocks: str) -> float:
    """By XLA's count, of a pullback with 4 layers; of one stream for "none"."""
    params = tiny.on_device(tiny.parameters(width=16, hidden=48, layers=4))
    batch = tiny.on_device(tiny.rollouts(groups=1))
    of_rows = tiny.objective(tiny.tokens_in(batch))

    def vanilla(params: Any, batch: Any) -> Any:
        logp, pull = jax.vjp(lambda p: tiny.forward(p, batch), params)
        lost = of_rows(logp, batch)
        return pull(lost.plasticity_cotangent + lost.stability_cotangent)

    def pulled(params: Any, batch: Any) -> Any:
        chosen = select_blocks(params, blocks)
        return pullback(tiny.forward, params, batch, of_rows, blocks=chosen, group_size=tiny.GROUP, norms="fast")

    compiled = jax.jit(vanilla if blocks == "none" else pulled).lower(params, batch).compile()
    return float(compiled.cost_analysis()["flops"])


def test_below_the_first_block_there_is_one_stream() -> None:
    top, every, one = _flops("layers/3/mlp"), _flops("mlp"), _flops("none")
    assert one < top < 1.2 * one
    assert every > 1.25 * one
