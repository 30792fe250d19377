"""Steps in which the noise of the gradients is not measured: two pullbacks of any model, and the same update."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny
from test_jax_train_step import rollouts
from tiny import BETA, GROUP, relative

import pcr_core
from pcr_jax import fast, init_state, make_train_step, pullback, resolve, select_blocks

OPTIONS: dict[str, Any] = {"group_size": GROUP, "beta": BETA}


def doubled(params: Any, inputs: Any) -> Any:
    """What it multiplies by are not its parameters, so nothing can be tapped."""
    return tiny.forward(params, inputs, lambda x, kernel: x @ (2 * kernel) / 2)


@pytest.mark.parametrize("blocks", ["mlp", "all", "layers/1/mlp"])
@pytest.mark.parametrize("compiled", [True, False])
def test_totals_alone_equal_those_of_the_loop(blocks: str, compiled: bool) -> None:
    params, batch = tiny.on_device(tiny.parameters(layers=2)), tiny.on_device(tiny.rollouts())
    chosen, cotangents = select_blocks(params, blocks), tiny.objective(tiny.tokens_in(batch))

    def pull(params: Any, batch: Any, **options: Any) -> Any:
        return pullback(tiny.forward, params, batch, cotangents, blocks=chosen, group_size=GROUP, **options)

    if compiled:
        pull = jax.jit(pull, static_argnames=("noise", "groups_at_once", "norms"))
    expected = pull(params, batch, norms="loop")
    for at_once in (1, 2):
        got = pull(params, batch, noise=False, groups_at_once=at_once)
        assert (got.response, got.stratum, got.path, expected.path) == (None, None, "autograd", "loop")
        assert relative(got.logp, expected.logp) <= 2e-6
        for stream in ("plasticity", "stability"):
            for one, other in zip(*(jax.tree.leaves(getattr(x, stream)) for x in (got, expected)), strict=True):
                assert relative(one, other) <= 2e-5
    with pytest.raises(ValueError, match="the noise was not measured"):
        got.scatter()


def test_a_rule_that_needs_the_noise_says_so_without_it() -> None:
    grads = {"w": jnp.ones(3)}
    update, report = resolve(grads, grads, None, pcr_core.PCR(), blocks="all")
    assert not report.statistics.has_noise
    assert report.weights.conflict_probability is None
    assert update["w"].tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="needs the gradients' noise"):
        resolve(grads, grads, None, pcr_core.PCR(alpha="variance"), blocks="all")


def test_every_second_step_and_a_resumed_run() -> None:
    optimizer = optax.sgd(1e-2)
    step: Any = make_train_step(tiny.forward, optimizer, noise_every=2, **OPTIONS)
    always = make_train_step(tiny.forward, optimizer, noise_every=1, **OPTIONS)
    params = tiny.on_device(tiny.parameters())
    state, other, paths = init_state(params, optimizer), init_state(params, optimizer), []
    for seed in range(4):
        if seed == 3:  # from a checkpoint, by another process
            state = jax.tree.map(jnp.array, state)
            step = make_train_step(tiny.forward, optimizer, noise_every=2, **OPTIONS)
        state, report = step(state, rollouts(seed))
        other, full = always(other, rollouts(seed))
        paths.append(report.path)
        assert report.resolution.statistics.has_noise == (report.path == "fast")
        assert full.path == "fast"
        assert relative(report.resolution.weights.stability, full.resolution.weights.stability) <= 1e-4
    assert paths == ["fast", "autograd", "fast", "autograd"]
    for one, two in zip(*(jax.tree.leaves(x.params) for x in (state, other)), strict=True):
        assert relative(one, two) <= 1e-5


@pytest.mark.parametrize(
    ("logp_fn", "options", "expected"),
    [
        (tiny.forward, {}, ["fast"] + ["autograd"] * 2),
        (doubled, {}, ["autograd"] * 3),
        (doubled, {"noise_every": 2}, ["loop", "autograd", "loop"]),
        (doubled, {"noise_every": 0}, ["autograd"] * 3),
        (doubled, {"rule": pcr_core.PCR(alpha="snr")}, ["loop"] * 3),
    ],
)
def test_where_it_is_cheap_by_default(
    logp_fn: Any, options: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "_SMALL", 0)
    optimizer, traced = optax.sgd(1e-2), []

    def counted(params: Any, inputs: Any) -> Any:
        traced.append(1)
        return logp_fn(params, inputs)

    step: Any = make_train_step(counted, optimizer, **OPTIONS, **options)
    state, paths = init_state(tiny.on_device(tiny.parameters()), optimizer), []
    for _ in expected:
        state, report = step(state, rollouts())
        paths.append(report.path)
    assert paths == expected
    assert step.compiled._cache_size() + step.plain._cache_size() == len(set(expected)), "a program of each kind"
    before = len(traced)
    step(state, rollouts(3))
    assert len(traced) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_every": -1}, "expected an integer >= 0"),
        ({"noise_every": 2.0}, "expected an integer >= 0"),
        ({"noise_every": True}, "expected an integer >= 0"),
        ({"noise_every": 0, "rule": pcr_core.PCR(alpha="snr")}, "reads the noise of the gradients in every step"),
    ],
)
def test_bad_options_are_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"noise_every.*{message}"):
        make_train_step(tiny.forward, optax.sgd(1.0), **OPTIONS, **options)
