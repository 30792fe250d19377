"""The same model with its layers as a list and as a stack that a scan goes through: the same blocks and updates."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import GROUP, relative

import pcr_core
from pcr_jax import Rollouts, fast, init_state, make_train_step, pullback, resolve, select_blocks
from pcr_jax.taps import Found

LAYERS = 3


def list_and_stack(axis: int = 0) -> tuple[Any, Any]:
    params = tiny.on_device(tiny.parameters(layers=LAYERS))
    return params, stacked(params, axis)


def stacked(params: Any, axis: int = 0) -> Any:
    return {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x, axis=axis), *params["layers"])}


def forward(params: Any, rows: Any, axis: int = 0) -> Any:
    """`tiny.forward`, with a scan over the layers."""
    h = params["embed"][rows["tokens"]]

    def one(h: Any, layer: Any) -> Any:
        return tiny.layer(h, layer), None

    h, _ = jax.lax.scan(one, h, jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), params["layers"]))
    return tiny.logp(h, params["head"], rows["tokens"])


def same(one: Any, other: Any, bound: float) -> None:
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert relative(x, y) <= bound


@pytest.mark.parametrize(
    ("axis", "granularity"),
    [
        (0, "tensor"),
        (1, "layer"),
        pytest.param(0, "layer", marks=pytest.mark.slow),  # that both select the same: test_jax_blocks.py
        pytest.param(1, "tensor", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("norms", ["fast", "loop", "copied"])
def test_a_list_and_a_stack_have_the_same_update(
    axis: int, granularity: Literal["tensor", "layer"], norms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if norms == "copied":  # as biases are, by taking the taps away
        monkeypatch.setattr(fast, "find", lambda closed, watched: Found({}, dict.fromkeys(watched, "")))
        norms = "fast"
    batch, rule = tiny.on_device(tiny.rollouts()), pcr_core.PCR(alpha="snr")
    of_rows = tiny.objective(tiny.tokens_in(batch))
    results = []
    for params, logp_fn in zip(
        list_and_stack(axis), (tiny.forward, lambda p, rows: forward(p, rows, axis)), strict=True
    ):
        blocks = select_blocks(params, "mlp", granularity)

        @jax.jit
        def run(params: Any, batch: Any, blocks: Any = blocks, logp_fn: Any = logp_fn) -> Any:
            pulled = pullback(logp_fn, params, batch, of_rows, blocks=blocks, group_size=GROUP, norms=norms)
            scatter = pulled.scatter()
            return pulled, resolve(pulled.plasticity, pulled.stability, scatter, rule, blocks=blocks)

        pulled, (update, report) = run(params, batch)
        assert pulled.path == norms
        results.append((pulled, update, report))
    (one, update, report), (two, other_update, other_report) = results
    assert one.response.shape == two.response.shape == (3, 2 * GROUP, LAYERS * (2 if granularity == "tensor" else 1))
    same((one.response, one.stratum), (two.response, two.stratum), 1e-5)
    same((stacked(one.plasticity, axis), stacked(one.stability, axis)), (two.plasticity, two.stability), 1e-5)
    same(stacked(update, axis), other_update, 1e-4)
    for part in ("weights", "statistics"):
        for field in fields(getattr(report, part)):
            x, y = (np.asarray(getattr(getattr(r, part), field.name), "float64") for r in (report, other_report))
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_train_step_with_state_of_a_stack(axis: int) -> None:
    """TemporalPrior keeps a mean for each leaf and a variance for each block."""
    rule = pcr_core.PCR(alpha="snr", prior=pcr_core.TemporalPrior(0.8))
    batch = tiny.on_device(tiny.rollouts())
    rollouts = Rollouts(
        {"tokens": batch["tokens"]}, *(batch[k] for k in ("logp_old", "logp_ref", "advantages", "mask"))
    )
    ends = []
    for params, logp_fn in zip(
        list_and_stack(axis), (tiny.forward, lambda p, rows: forward(p, rows, axis)), strict=True
    ):
        optimizer = optax.sgd(0.1)
        step = make_train_step(logp_fn, optimizer, group_size=GROUP, beta=0.1, rule=rule)
        state = init_state(params, optimizer, rule)
        for _ in range(2):
            state, report = step(state, rollouts)
        assert bool(report.resolution.weights.finite.all())
        ends.append(state)
    same(stacked(ends[0].params, axis), ends[1].params, 1e-4)
    same(ends[0].prior.plasticity_var, ends[1].prior.plasticity_var, 1e-3)


def test_one_layer_that_is_not_finite_says_so_alone() -> None:
    params = {"layers": {"up": jnp.ones((3, 4, 5)), "down": jnp.ones((3, 5, 4))}}
    gradient = {"layers": {"up": params["layers"]["up"].at[1, 0, 0].set(jnp.nan), "down": params["layers"]["down"]}}
    blocks = select_blocks(params, "all")
    update, report = resolve(gradient, params, None, blocks=blocks)
    lost = [name for name, finite in zip(blocks.names, report.weights.finite.tolist(), strict=True) if not finite]
    assert lost == ["layers/1/up"]
    assert bool(jnp.isfinite(update["layers"]["up"][jnp.asarray([0, 2])]).all())


def test_a_stack_that_the_model_does_not_scan_takes_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_SMALL", 0)
    params, x = {"layers": {"w": jnp.ones((3, 4, 4))}}, jnp.ones((6, 5, 4))
    blocks = select_blocks(params, "all")

    def across(params: Any, rows: Any) -> Any:
        weights = jnp.moveaxis(params["layers"]["w"], 1, 0)  # four of 3 x 4
        return jax.lax.scan(lambda h, w: (h + (h[..., :3] @ w), None), rows, weights)[0][..., 0]

    with pytest.raises(ValueError, match="layers/w is a stack of layers along axis 0, which the model does not scan"):
        pullback(across, params, x, lambda logp, rows: (logp, logp), blocks=blocks, group_size=3, norms="fast")
