"""The baseline of `make_train_step`: from measured norms, used from the next step on, part of the state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_jax_train_step import rollouts
from tiny import BETA, GROUP

import pcr_core
from pcr_jax import init_state, make_train_step, pullback, select_blocks

OPTIONS: dict[str, Any] = {"group_size": GROUP, "beta": BETA, "rule": pcr_core.GRPO()}


def rewarded(seed: int) -> Any:
    """On policy, with advantages well above zero, which call for a shift."""
    data = rollouts(seed)
    logp = tiny.forward(tiny.on_device(tiny.parameters()), data.inputs)
    return replace(data, logp_old=logp, advantages=data.advantages + 2)


@pytest.mark.parametrize("normalization", ["grpo", pytest.param("dr_grpo", marks=pytest.mark.slow)])
def test_b_is_that_of_the_responses_norms(normalization: Any) -> None:
    still = optax.sgd(0.0)
    params = tiny.on_device(tiny.parameters())
    options = OPTIONS | {"normalization": normalization, "noise_every": 1}
    step = make_train_step(tiny.forward, still, baseline=0.5, baseline_memory=0.6, **options)
    state, blocks, sums = init_state(params, still, baseline=True), select_blocks(params, "mlp"), None
    for seed in (1, 2, 3):
        data = rewarded(seed)
        weight = data.mask.mean(1) if normalization == "grpo" else jnp.ones(data.advantages.shape)
        normalizer = pcr_core.objective.batch_normalizer(data.mask.astype(jnp.float32), normalization)

        def cotangents(logp: Any, rows: Any, normalizer: Any = normalizer) -> Any:
            return pcr_core.grpo_objective(
                logp, rows.logp_old, rows.logp_ref, rows.advantages, rows.mask, beta=BETA, normalization=normalization,
                normalizer=normalizer,
            )  # fmt: skip

        def logp_fn(params: Any, rows: Any) -> Any:
            return tiny.forward(params, rows.inputs)

        pulled = pullback(logp_fn, params, data, cotangents, blocks=blocks, group_size=GROUP, norms="loop")
        assert pulled.response is not None
        ids = jnp.arange(data.advantages.size) // GROUP
        now = pcr_core.baseline_sums(pulled.response[0].sum(1), data.advantages, group_ids=ids, weight=weight)
        before = 0.0 if sums is None else 0.5 * float(pcr_core.estimate_baseline(sums).shift)
        state, report = step(state, data)
        assert report.baseline is not None
        assert float(report.baseline.applied) == pytest.approx(before, rel=1e-3)
        expected = float(pcr_core.variance_reduction(now, before))
        assert float(report.baseline.reduction) == pytest.approx(expected, rel=1e-2, abs=1e-5)  # type: ignore[arg-type]
        sums = now if sums is None else pcr_core.update_baseline_sums(sums, now, memory=0.6)
        np.testing.assert_allclose(jax.tree.leaves(state.baseline), jax.tree.leaves(sums), rtol=1e-3)
    assert before != 0, "the problem must call for a shift, or this shows nothing"


def test_the_update_is_that_of_shifted_advantages_and_waits_between_measurements() -> None:
    optimizer = optax.sgd(1e-2)
    params = tiny.on_device(tiny.parameters())
    step = make_train_step(tiny.forward, optimizer, baseline=1.0, noise_every=2, normalization="dr_grpo", **OPTIONS)
    plain = make_train_step(tiny.forward, optimizer, noise_every=2, normalization="dr_grpo", **OPTIONS)
    state, other, shifts = init_state(params, optimizer, baseline=True), init_state(params, optimizer), []
    for seed in (1, 2, 3, 4):
        data = rewarded(seed)
        state, report = step(state, data)
        assert report.baseline is not None
        b = float(report.baseline.applied)
        assert (report.baseline.reduction is None) == (seed % 2 == 0)
        other, _ = plain(other, replace(data, advantages=data.advantages - jnp.float32(b)))
        shifts.append(b)
        for one, two in zip(*(jax.tree.leaves(x.params) for x in (state, other)), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    assert shifts[0] == 0 != shifts[1] == shifts[2] != shifts[3]


def test_rows_that_fill_up_do_not_count() -> None:
    data = rewarded(1)
    n = data.advantages.size
    there = jnp.arange(n) % GROUP != GROUP - 1
    still, found = optax.sgd(0.0), []
    for junk in (0.0, 50.0):
        step = make_train_step(tiny.forward, still, baseline=1.0, noise_every=1, normalization="dr_grpo", **OPTIONS)
        state = init_state(tiny.on_device(tiny.parameters()), still, baseline=True)
        filled = replace(data, advantages=jnp.where(there, data.advantages, junk), present=there)
        for _ in range(2):
            state, _ = step(state, filled)
        found.append(jax.tree.leaves(state.baseline))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_misuse_is_named() -> None:
    optimizer = optax.sgd(0.1)
    params = tiny.on_device(tiny.parameters())
    step = make_train_step(tiny.forward, optimizer, baseline=0.5, noise_every=1, **OPTIONS)
    with pytest.raises(ValueError, match="init_state"):
        step(init_state(params, optimizer), rollouts())
    for options, message in (
        ({"baseline": 0.0}, "baseline: expected the share"),
        ({"baseline": 0.5, "baseline_memory": 1.0}, "baseline_memory: expected"),
        ({"baseline": 0.5, "noise_every": 0}, "noise_every=0: the baseline"),
    ):
        with pytest.raises(ValueError, match=message):
            make_train_step(tiny.forward, optimizer, **OPTIONS, **options)
