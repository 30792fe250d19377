"""Groups of unequal size, filled up with rows that contribute nothing, against the same without these rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import BETA, GROUP, assert_statistics_close, relative

import pcr_core
from pcr_jax import Rollouts, init_state, make_train_step, pullback, select_blocks

PRESENT = np.asarray([True, False, True, True, True, True, False, False, False])  # groups of 2, 3 and none
IDS = np.arange(3).repeat(GROUP)


def data(dtype: str) -> Any:
    batch = tiny.rollouts(groups=3, dtype=dtype)
    return {**batch, "mask": batch["mask"] & PRESENT[:, None]}


@pytest.mark.parametrize("norms", ["fast", pytest.param("loop", marks=pytest.mark.slow)])
def test_scatter_is_that_of_the_responses_present(norms: Any) -> None:
    with jax.enable_x64(True):
        params, batch = tiny.on_device(tiny.parameters(dtype="float64")), tiny.on_device(data("float64"))
        blocks, of_rows = select_blocks(params), tiny.objective(tiny.tokens_in(data("float64")))
        real = jax.tree.map(lambda x: x[PRESENT], batch)
        p, s = tiny.contributions(params, real, blocks.leaves)
        expected = pcr_core.contribution_statistics(p, s, group_ids=jnp.asarray(IDS[PRESENT]), sizes=blocks.sizes)

        def run(params: Any, batch: Any) -> Any:
            pulled = pullback(tiny.forward, params, batch, of_rows, blocks=blocks, group_size=GROUP, norms=norms)
            return pulled.scatter(jnp.asarray(PRESENT)), pulled.scatter()

        got, blind = jax.jit(run)(params, batch)
        for name in ("plasticity_var", "stability_var"):
            np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-10)
            assert (np.abs(getattr(blind, name) / getattr(expected, name) - 1) > 1e-5).all()
        scale = np.sqrt(expected.plasticity_var * expected.stability_var)
        assert (np.abs(got.covariance - expected.covariance) <= 1e-10 * scale).all()


@pytest.mark.parametrize(
    ("normalization", "importance"),
    [
        ("grpo", "token"),
        pytest.param("dr_grpo", "sequence", marks=pytest.mark.slow),
        pytest.param("dapo", "token", marks=pytest.mark.slow),
    ],
)
def test_a_step_does_not_see_the_rows_that_fill_up(normalization: Any, importance: Any) -> None:
    """Of two groups of three, against the same with a third group of rows that are not there."""
    sgd = optax.sgd(1.0)
    step = make_train_step(
        tiny.forward, sgd, group_size=GROUP, beta=BETA, normalization=normalization, importance=importance
    )
    found = []
    for groups in (2, 3):
        batch = tiny.rollouts(groups=3)
        batch = {name: x[: groups * GROUP] for name, x in batch.items()}
        present = None if groups == 2 else IDS < 2
        if present is not None:
            batch["advantages"] = jnp.where(present, batch["advantages"], jnp.nan)
            batch["logp_old"] = jnp.where(present[:, None], batch["logp_old"], jnp.nan)
        rollouts = Rollouts({"tokens": batch.pop("tokens")}, present=present, **batch)
        state, report = step(init_state(tiny.on_device(tiny.parameters()), sgd), rollouts)
        found.append((state.params, report))
    (params, report), (other, padded) = found
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        assert relative(y, x) <= 1e-6
    for name in ("plasticity_loss", "stability_loss", "kl", "clip_fraction"):
        assert float(getattr(padded, name)) == pytest.approx(float(getattr(report, name)), rel=1e-5), name
    assert_statistics_close(padded.resolution.statistics, report.resolution.statistics, 1e-5)


def test_a_group_of_one_is_seen_and_bad_input_is_named() -> None:
    params = {"w": jnp.eye(3)}
    x = jnp.arange(24.0).reshape(4, 2, 3) / 24

    def logp_fn(params: Any, x: Any) -> Any:
        return jax.nn.log_softmax(x @ params["w"])[..., 0]

    pulled = pullback(
        logp_fn, params, x, lambda logp, x: (logp, logp), blocks=select_blocks(params, "all"), group_size=2
    )
    alone = jnp.asarray([True, False, True, True])
    with pytest.raises(ValueError, match="a stratum of one response"):
        pulled.scatter(alone)
    assert np.isnan(jax.jit(type(pulled).scatter)(pulled, alone).plasticity_var).all()
    with pytest.raises(ValueError, match=r"present: expected booleans of shape \(4,\), got bool of shape \(3,\)"):
        pulled.scatter(jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"present: expected booleans of shape \(4,\), got int32"):
        pulled.scatter(jnp.ones(4, jnp.int32))
