"""With x64 off no float64 is narrowed in silence; with x64 on float32 stays float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import GROUP, relative

import pcr_core
from pcr_core import BlockStatistics, PriorState, Scatter
from pcr_jax import (
    Rollouts,
    dense,
    init_prior,
    init_state,
    make_train_step,
    pullback,
    resolve,
    resolving,
    select_blocks,
)

WIDE = np.ones((4, 2))
NARROW = np.ones((4, 2), dtype="float32")
P, NOISE = {"w": jnp.ones((2, 2))}, Scatter(jnp.ones(1), jnp.ones(1), jnp.zeros(1))
ONE = np.ones(1)
BLOCKS = select_blocks(P, "all")
TEMPORAL = pcr_core.PCR(alpha="variance", prior=pcr_core.TemporalPrior())
SGD = optax.sgd(1.0)
BATCH = Rollouts(NARROW, NARROW, NARROW, NARROW[:, 0], NARROW > 0)


def logp_fn(params: Any, x: Any) -> Any:
    x = x["x"] if isinstance(x, dict) else x
    return jax.nn.log_softmax(dense(x[:, None] * jnp.ones((1, 2, 1)), params["w"]))[..., 0]


def pull(params: Any = P, batch: Any = NARROW, cotangents: Any = lambda logp, x: (logp, logp)) -> Any:
    return pullback(logp_fn, params, batch, cotangents, blocks=BLOCKS, group_size=2)


def step(rollouts: Rollouts = BATCH, params: Any = P, **options: Any) -> Any:
    state = init_state(P, SGD)
    if params is not P:
        state = replace(state, params=params)
    return make_train_step(logp_fn, SGD, group_size=2, beta=options.pop("beta", 0.1), blocks="all")(state, rollouts)


def decide(p: Any = P, s: Any = P, statistics: Any = NOISE, **options: Any) -> Any:
    return resolve(p, s, statistics, options.pop("rule", pcr_core.PCR(alpha="variance")), blocks=BLOCKS, **options)


def chain(p: Any = P, s: Any = P, statistics: Any = NOISE) -> Any:
    tx = resolving(blocks="all")
    return tx.update(p, tx.init(P), P, stability=s, statistics=statistics)


W = {"w": np.ones((2, 2))}
CASES: list[tuple[str, Callable[[], Any]]] = [
    ("params: w", lambda: pull(params=W)),
    ("batch", lambda: pull(batch=WIDE)),
    ("batch: x", lambda: pull(batch={"x": WIDE, "y": NARROW})),
    ("cotangents: stability", lambda: pull(cotangents=lambda logp, x: (logp, WIDE[:2]))),
    ("plasticity_grads: w", lambda: decide(p=W)),
    ("stability_grads: w", lambda: decide(s=W)),
    ("statistics: covariance", lambda: decide(statistics=replace(NOISE, covariance=ONE))),
    ("statistics: plasticity_sq", lambda: decide(statistics=BlockStatistics(*(ONE,) * 7))),
    ("prior: plasticity_var", lambda: decide(rule=TEMPORAL, prior=replace(prior(), plasticity_var=ONE))),
    ("prior: stability_mean/0", lambda: decide(rule=TEMPORAL, prior=replace(prior(), stability_mean=(W["w"],)))),
    ("params: w", lambda: init_prior(W, BLOCKS)),
    ("params: w", lambda: init_state(W, SGD)),
    ("state: params/w", lambda: step(params=W)),
    ("rollouts: inputs", lambda: step(replace(BATCH, inputs=WIDE))),
    ("rollouts: logp_old", lambda: step(replace(BATCH, logp_old=WIDE))),
    ("rollouts: logp_ref", lambda: step(replace(BATCH, logp_ref=WIDE))),
    ("rollouts: advantages", lambda: step(replace(BATCH, advantages=WIDE[:, 0]))),
    ("beta", lambda: step(beta=np.asarray(0.1))),
    ("x", lambda: dense(WIDE, jnp.ones((2, 3)))),
    ("kernel", lambda: dense(jnp.ones((4, 2)), np.ones((2, 3)))),
    ("plasticity_grads: w", lambda: chain(p=W)),
    ("stability_grads: w", lambda: chain(s=W)),
    ("statistics: plasticity_var", lambda: chain(statistics=replace(NOISE, plasticity_var=ONE))),
]


def prior() -> PriorState[Any]:
    return init_prior(P, BLOCKS)


@pytest.mark.parametrize(("argument", "call"), CASES, ids=[f"{k}-{name}" for k, (name, _) in enumerate(CASES)])
def test_float64_is_refused_by_name_while_x64_is_off(argument: str, call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=f"^{argument} is float64, and JAX would make it float32"):
        call()


def test_numbers_of_numpy_are_no_arrays() -> None:
    step(beta=np.float64(0.1))


@pytest.mark.slow
def test_the_same_calls_are_right_with_x64_on() -> None:
    with jax.enable_x64(True):
        for argument, call in CASES:
            if not argument.startswith(("state", "prior")):  # these mix dtypes within one state
                call()


def test_a_float32_step_with_x64_on() -> None:
    """The state keeps its dtypes, so nothing compiles twice; only sums over a block are wider."""
    found = {}
    for x64 in (False, True):
        with jax.enable_x64(x64):
            data = tiny.rollouts(groups=2)
            rollouts = Rollouts({"tokens": data.pop("tokens")}, **data)
            optimizer = optax.adam(1e-3)
            train: Any = make_train_step(
                tiny.forward, optimizer, group_size=GROUP, beta=np.float64(0.1), rule=TEMPORAL, normalization="dapo"
            )
            state = init_state(tiny.on_device(tiny.parameters()), optimizer, TEMPORAL)
            before = jax.tree.map(lambda x: x.dtype, state)
            for _ in range(2):
                state, report = train(state, rollouts)
            assert jax.tree.map(lambda x: x.dtype, state) == before
            assert train.compiled._cache_size() == 1
            assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
            assert {x.dtype.name for x in jax.tree.leaves(report.resolution.statistics)} == {
                "float64" if x64 else "float32"
            }
            assert report.stability_loss.dtype == jnp.float32
            found[x64] = jax.device_get((state.prior, report.resolution.weights.alpha, report.resolution.statistics))
    assert relative(found[True][1], found[False][1]) <= 1e-5
    for mean, other in zip(*(jax.tree.leaves(found[x64][0].plasticity_mean) for x64 in (True, False)), strict=True):
        assert relative(mean, other) <= 1e-4
    tiny.assert_statistics_close(found[False][2], found[True][2], 1e-4)
