"""Both pullbacks against gradients taken one response at a time, compiled and not, at toy and at realistic sizes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import GROUP, assert_statistics_close, forward, objective, relative, tokens_in

import pcr_core
from pcr_jax import Blocks, Pulled, kernel_products, pullback, resolve, select_blocks


def pull(params: Any, batch: Any, norms: Any, blocks: Blocks | None = None, **options: Any) -> Pulled:
    blocks = select_blocks(params) if blocks is None else blocks
    of_rows = objective(tokens_in(batch))
    options.setdefault("logp_fn", forward)
    logp_fn = options.pop("logp_fn")
    return pullback(logp_fn, params, batch, of_rows, blocks=blocks, group_size=GROUP, norms=norms, **options)


def statistics(pulled: Pulled, blocks: Blocks) -> Any:
    return resolve(pulled.plasticity, pulled.stability, pulled.scatter(), blocks=blocks)[1].statistics


@pytest.mark.parametrize(
    ("dtype", "norms", "mode"),
    [
        pytest.param(*("float32", "fast", "eager"), marks=pytest.mark.slow),
        ("float32", "fast", "jit"),
        ("float32", "loop", "jit"),
        pytest.param(*("float32 in x64", "fast", "jit"), marks=pytest.mark.slow),
        ("float64", "fast", "jit"),
        pytest.param(*("float64", "loop", "eager"), marks=pytest.mark.slow),
    ],
)
def test_equals_gradients_of_single_responses(dtype: str, norms: str, mode: str) -> None:
    bound = 1e-10 if dtype == "float64" else 1e-5
    with jax.enable_x64("64" in dtype):
        dtype = dtype.split()[0]
        params = tiny.on_device(tiny.parameters(dtype=dtype))
        batch = tiny.on_device(tiny.rollouts(dtype=dtype))
        blocks = select_blocks(params)
        p, s = tiny.contributions(params, batch, blocks.leaves)
        ids = jnp.arange(2).repeat(GROUP)
        expected = pcr_core.contribution_statistics(p, s, group_ids=ids, sizes=blocks.sizes)
        if mode == "jit":
            total = tokens_in(batch)
            pulled = jax.jit(
                lambda params, batch: pullback(
                    forward, params, batch, objective(total), blocks=blocks, group_size=GROUP, norms=norms
                )
            )(params, batch)
        else:
            pulled = pull(params, batch, norms)
        assert_statistics_close(statistics(pulled, blocks), expected, 10 * bound)
        for got, rows in ((pulled.plasticity, p), (pulled.stability, s)):
            leaves = jax.tree.leaves(got)
            assert relative(np.concatenate([leaves[k].reshape(-1) for k in blocks.leaves]), rows.sum(0)) <= bound
        assert relative(pulled.logp, forward(params, batch, jnp.matmul)) <= bound
        assert relative(pulled.response[2].sum(1), (p * s).sum(1)) <= 10 * bound


@pytest.mark.parametrize("norms", [pytest.param("loop", marks=pytest.mark.slow), "fast"])
def test_sum_rule_is_the_gradient_of_the_summed_loss(norms: str) -> None:
    params, batch = tiny.on_device(tiny.parameters()), tiny.on_device(tiny.rollouts(groups=4))
    of_rows = objective(tokens_in(batch))

    def loss(p: Any) -> Any:
        obj = of_rows(forward(p, batch, jnp.matmul), batch)
        return (obj.plasticity_loss + obj.stability_loss).sum()

    pulled = pull(params, batch, norms)
    update, _ = resolve(pulled.plasticity, pulled.stability, pulled.scatter(), pcr_core.GRPO())
    for got, expected in zip(jax.tree.leaves(update), jax.tree.leaves(jax.jit(jax.grad(loss))(params)), strict=True):
        assert relative(got, expected) <= 1e-5


@pytest.mark.slow
def test_passes_of_several_groups_change_nothing() -> None:
    params, batch = tiny.on_device(tiny.parameters()), tiny.on_device(tiny.rollouts(groups=4))
    one, two = pull(params, batch, "fast"), pull(params, batch, "fast", groups_at_once=2)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert relative(y, x) <= 1e-5


def test_arrays_that_two_leaves_share() -> None:
    params = tiny.on_device(tiny.parameters(width=8, hidden=8))
    params["layers"][0]["mlp"]["down"] = params["layers"][0]["mlp"]["up"]
    batch = tiny.on_device(tiny.rollouts())
    fast, loop = pull(params, batch, "fast"), pull(params, batch, "loop")
    for x, y in zip(jax.tree.leaves(fast), jax.tree.leaves(loop), strict=True):
        assert relative(x, y) <= 1e-5


@pytest.mark.slow
def test_bfloat16_parameters_are_summed_in_float32() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.on_device(tiny.parameters()))
    batch = tiny.on_device(tiny.rollouts())
    fast, loop = pull(params, batch, "fast"), pull(params, batch, "loop")
    assert {x.dtype.name for x in jax.tree.leaves(fast)} <= {"float32", "bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(fast.plasticity)} == {"float32"}
    for x, y in zip(jax.tree.leaves(fast.plasticity), jax.tree.leaves(loop.plasticity), strict=True):
        assert relative(x, y) <= 0.05


@pytest.mark.parametrize("way", ["one by one", "partitioned", "in batches", "in batches of rows"])
def test_realistic_sizes(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels of 512 x 1536 and 16 responses of 32 tokens, against float64 in NumPy; also what is not for CPUs."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 16, 32, 512)).astype("float32")
    dp, ds = (rng.standard_normal((2, 16, 32, 1536)).astype("float32") for _ in range(2))
    if way == "in batches of rows":
        monkeypatch.setattr(kernel_products, "_HELD", 5_000_000)
    if way.startswith("in batches"):
        totals, response, stratum = kernel_products._in_batches(*map(jnp.asarray, (x, dp, ds)), 8)
    else:
        compiled = jax.jit(kernel_products.kernel_products, static_argnums=3, static_argnames="whole")
        totals, response, stratum = compiled(x, dp, ds, 8, whole=way == "one by one")
    for rows in ([0], [5], list(range(8, 16))):
        g, h = (sum(x[1, i].astype("float64").T @ d[1, i].astype("float64") for i in rows) for d in (dp, ds))
        expected = np.asarray([(g * g).sum(), (h * h).sum(), (g * h).sum()])
        scale = np.asarray([expected[0], expected[1], np.sqrt(expected[0] * expected[1])])
        got = np.asarray(response[1, rows[0]] if len(rows) == 1 else stratum[1, 1], dtype="float64")
        assert (np.abs(got - expected) <= 1e-6 * scale).all(), np.abs(got - expected) / scale
    for stream, dy in zip(totals, (dp, ds), strict=True):
        assert relative(stream, np.einsum("knti,knto->kio", x, dy, optimize=True)) <= 1e-5


@pytest.mark.slow
def test_a_model_of_realistic_width_compiled_and_not() -> None:
    params = tiny.on_device(tiny.parameters(width=512, hidden=1536, layers=1))
    batch = tiny.on_device(tiny.rollouts(length=125))
    blocks, total = select_blocks(params), tokens_in(batch)
    p, s = tiny.contributions(params, batch, blocks.leaves, compiled=False)
    expected = pcr_core.contribution_statistics(p, s, group_ids=jnp.arange(2).repeat(GROUP), sizes=blocks.sizes)

    def run(params: Any, batch: Any, norms: Any) -> Pulled:
        of_rows = objective(total)
        return pullback(forward, params, batch, of_rows, blocks=blocks, group_size=GROUP, norms=norms)

    for norms in ("fast", "loop"):
        pulled = jax.jit(run, static_argnums=2)(params, batch, norms)
        assert_statistics_close(statistics(pulled, blocks), expected, 1e-4)
        for got, rows in ((pulled.plasticity, p), (pulled.stability, s)):
            leaves = jax.tree.leaves(got)
            assert relative(np.concatenate([leaves[k].reshape(-1) for k in blocks.leaves]), rows.sum(0)) <= 1e-4


def test_bad_input_is_named() -> None:
    params, batch = tiny.on_device(tiny.parameters()), tiny.on_device(tiny.rollouts())
    blocks = select_blocks(params)

    def call(**changes: Any) -> Any:
        arguments: dict[str, Any] = {
            "logp_fn": forward,
            "params": params,
            "batch": batch,
            "cotangents": objective(20.0),
            "blocks": blocks,
            "group_size": GROUP,
            **changes,
        }
        return pullback(**arguments)

    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "batch: 6 rows are not whole groups of 4", {"group_size": 4}),
        (ValueError, "group_size: expected an integer >= 2", {"group_size": 1}),
        (ValueError, "batch: mask has 5 rows, the first leaf has 6", {"batch": {**batch, "mask": batch["mask"][:5]}}),
        (ValueError, "batch: t has no axis of responses", {"batch": {**batch, "t": jnp.ones(())}}),
        (TypeError, "batch: logp_old.* is float64", {"batch": {**batch, "logp_old": np.ones((6, 5))}}),
        (TypeError, "params: step is int32", {"params": {**params, "step": jnp.zeros((), jnp.int32)}}),
        (ValueError, "params: its 5 leaves are not the 6", {"params": {k: params[k] for k in ("embed", "layers")}}),
        (ValueError, "norms: expected", {"norms": "slow"}),
        (ValueError, "groups_at_once: 4 does not divide the 2 groups", {"groups_at_once": 4}),
        (ValueError, "groups_at_once: expected a positive", {"groups_at_once": 0}),
        (ValueError, r"logp_fn: expected shape \(rows, T\)", {"logp_fn": lambda p, b: forward(p, b).sum(1)}),
        (ValueError, "cotangents: stability has shape", {"cotangents": lambda lp, b: (lp, lp[:, 1:])}),
        (TypeError, "cotangents: expected a pair", {"cotangents": lambda lp, b: lp}),
    ]
    for kind, message, changes in cases:
        for norms in ("loop", "auto"):
            with pytest.raises(kind, match=message):
                call(**{"norms": norms, **changes})
