"""The compiled step: what it computes, how often it compiles, and what of it a checkpoint holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import BETA, GROUP, relative

import pcr_core
from pcr_jax import Rollouts, init_state, make_train_step


def rollouts(seed: int = 1, groups: int = 4) -> Rollouts:
    data = tiny.on_device(tiny.rollouts(groups=groups, seed=seed))
    tokens = {"tokens": data.pop("tokens")}
    return Rollouts(tokens, **data)


@pytest.mark.parametrize(
    "normalization", ["dapo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("grpo", "dr_grpo"))]
)
def test_the_sum_rule_takes_the_step_of_plain_grpo(normalization: Any) -> None:
    params, data = tiny.on_device(tiny.parameters()), rollouts()

    def loss(p: Any) -> Any:
        logp = tiny.forward(p, data.inputs, jnp.matmul)
        obj = pcr_core.grpo_objective(
            logp, data.logp_old, data.logp_ref, data.advantages, data.mask, beta=BETA, normalization=normalization
        )
        return (obj.plasticity_loss + obj.stability_loss).sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    options: dict[str, Any] = {"group_size": GROUP, "beta": BETA, "normalization": normalization}
    sgd = optax.sgd(1.0)
    step = make_train_step(tiny.forward, sgd, rule=pcr_core.GRPO(), microbatch=2 * GROUP, **options)
    state, report = step(init_state(params, sgd), data)
    for new, old, grad in zip(*(jax.tree.leaves(x) for x in (state.params, params, grads)), strict=True):
        assert relative(old - new, grad) <= 1e-4
    assert float(report.plasticity_loss + report.stability_loss) == pytest.approx(float(value), rel=1e-5)
    assert report.resolution.weights.finite.all()


def test_compiles_once_and_donates() -> None:
    traces = []

    def logp_fn(params: Any, inputs: Any) -> Any:
        traces.append(1)
        return tiny.forward(params, inputs)

    optimizer = optax.adam(1e-2)
    step: Any = make_train_step(logp_fn, optimizer, group_size=GROUP, beta=BETA, noise_every=1)
    params = tiny.on_device(tiny.parameters())
    first = state = init_state(params, optimizer)
    state, _ = step(state, rollouts())
    traced = len(traces)
    for seed in range(2, 5):
        state, _ = step(state, rollouts(seed))
    assert len(traces) == traced
    assert step.compiled._cache_size() == 1
    assert int(state.step) == 4
    assert all(x.is_deleted() for x in jax.tree.leaves(first.params))
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_a_checkpoint_continues_exactly(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")
    optimizer, rule = optax.adam(1e-2), pcr_core.PCR(alpha="variance", prior=pcr_core.TemporalPrior())
    step = make_train_step(tiny.forward, optimizer, group_size=GROUP, beta=BETA, rule=rule)
    state, _ = step(init_state(tiny.on_device(tiny.parameters()), optimizer, rule), rollouts())
    assert state.prior is not None
    with checkpoint.StandardCheckpointer() as store:
        store.save(tmp_path / "state", state)
        store.wait_until_finished()
        again = store.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    for x, y in zip(*(jax.tree.leaves(step(s, rollouts(2))[0]) for s in (state, again)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_bad_input_is_named() -> None:
    options: dict[str, Any] = {"group_size": GROUP, "beta": BETA}
    with pytest.raises(TypeError, match="optimizer: expected an optax"):
        make_train_step(tiny.forward, "adam", **options)
    with pytest.raises(ValueError, match="normalization"):
        make_train_step(tiny.forward, optax.sgd(1.0), **options, normalization="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_size: expected a positive integer, got 0"):
        make_train_step(tiny.forward, optax.sgd(1.0), **{**options, "group_size": 0}, microbatch=4)
    with pytest.raises(ValueError, match="microbatch: expected a positive integer"):
        make_train_step(tiny.forward, optax.sgd(1.0), **options, microbatch=2.0)
    with pytest.raises(ValueError, match="microbatch: expected whole groups of 3"):
        make_train_step(tiny.forward, optax.sgd(1.0), **options, microbatch=4)
    for name, value in (
        ("beta", -0.1),
        ("beta", jnp.asarray(jnp.nan)),
        ("clip", (0.2, -0.1)),
        ("importance", "word"),
        ("kl", "k1"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):  # not in the first step, after generating
            make_train_step(tiny.forward, optax.sgd(1.0), **{**options, name: value})
    step = make_train_step(tiny.forward, optax.sgd(1.0), **options)
    state = init_state(tiny.on_device(tiny.parameters()), optax.sgd(1.0))
    with pytest.raises(TypeError, match="rollouts: expected"):
        step(state, tiny.rollouts())
    for odd in (0.5, 2.0):
        data = rollouts()
        with pytest.raises(ValueError, match=f"rollouts: mask: expected booleans, or 0 and 1, got {odd:g}"):
            step(state, replace(data, mask=odd * data.mask))
    assert not any(x.is_deleted() for x in jax.tree.leaves(state)), "refused before it is given up"


def _linear(params: Any, x: Any) -> Any:
    return jax.nn.log_softmax(x @ params["w"].astype(x.dtype))[..., 0]


def _few(scale: float = 1.0) -> tuple[Rollouts, Any]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 3, 2)), dtype=jnp.float32)
    old, ref = (jnp.asarray(-rng.exponential(size=(4, 3)), dtype=jnp.float32) for _ in range(2))
    advantages = jnp.asarray([1.0, -1.0, 0.5, -0.5], dtype=jnp.float32) * scale
    return Rollouts(x, old, ref, advantages, jnp.ones((4, 3), dtype=jnp.float32)), {"w": jnp.ones((2, 5))}


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_the_ratio_in_the_kl(importance: Any) -> None:
    data, params = _few()
    options: dict[str, Any] = {"beta": 0.3, "kl": "k3_ratio", "importance": importance}

    def loss(p: Any) -> Any:
        fields = (data.logp_old, data.logp_ref, data.advantages, data.mask)
        obj = pcr_core.grpo_objective(_linear(p, data.inputs), *fields, **options)
        return (obj.plasticity_loss + obj.stability_loss).sum()

    sgd = optax.sgd(1.0)
    step = make_train_step(_linear, sgd, group_size=2, rule=pcr_core.GRPO(), blocks="all", norms="loop", **options)
    state, report = step(init_state(params, sgd), data)
    assert relative(params["w"] - state.params["w"], jax.grad(loss)(params)["w"]) <= 1e-5
    assert float(report.plasticity_loss + report.stability_loss) == pytest.approx(float(loss(params)), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_an_update_that_the_parameters_dtype_cannot_hold_is_reported(scale: float) -> None:
    """Totals of float16 parameters are float32, and go to the optimizer as float16."""
    data, params = _few(scale)
    seen = []
    tell = optax.stateless(
        lambda updates, params: jax.tree.map(lambda u: (jax.debug.callback(seen.append, u), u)[1], updates)
    )
    step = make_train_step(_linear, tell, group_size=2, beta=0.1, rule=pcr_core.GRPO(), blocks="all", norms="loop")
    _, report = step(init_state({"w": params["w"].astype(jnp.float16)}, tell), data)
    jax.effects_barrier()
    assert bool(report.resolution.weights.finite[0]) == bool(np.isfinite(seen[0]).all()) == (scale == 1)
    assert np.isfinite(report.resolution.statistics.plasticity_sq).all()


def test_parameters_without_a_meant_dtype_get_one() -> None:
    """Weakly typed ones would be others after the first step, which compiles anew for them."""
    params = {"w": jnp.full((3, 3), 1.0)}
    assert params["w"].weak_type
    state = init_state(params, optax.sgd(1.0))
    assert not state.params["w"].weak_type
    assert state.params["w"].dtype == params["w"].dtype
