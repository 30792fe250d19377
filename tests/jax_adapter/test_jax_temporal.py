"""The temporal prior over several steps: against the core's dense method, against pcr_torch, and in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import BETA, GROUP, relative

import pcr_core
from pcr_core import Scatter
from pcr_jax import Rollouts, init_prior, init_state, make_train_step, resolve, select_blocks

RULE = pcr_core.PCR(alpha="snr", prior=pcr_core.TemporalPrior(0.8))
SHAPES = {"a": (4, 3), "b": (5,), "c": (2,)}
IDS = np.asarray([0, 0, 1, 1, 1])


def contributions(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of each response, by leaf; the third step's stability is not finite in block a."""
    rng = np.random.default_rng(step)
    p = {name: rng.standard_normal((5, *shape)) for name, shape in SHAPES.items()}
    s = {name: rng.standard_normal(x.shape) - 0.5 * x for name, x in p.items()}
    if step == 2:
        s["a"][1, 2, 1] = np.inf
    return p, s


def dense(tree: dict[str, Any]) -> Any:
    return np.concatenate([tree[name].reshape(5, -1) for name in ("a", "b")], axis=1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
def test_equals_the_dense_method_over_steps(compiled: bool, dtype: str, bound: float) -> None:
    with jax.enable_x64(dtype == "float64"), np.errstate(invalid="ignore"):
        blocks = select_blocks({name: jnp.zeros(shape) for name, shape in SHAPES.items()}, "[ab]")
        form = jax.jit(resolve, static_argnames=("rule", "blocks")) if compiled else resolve
        state, prior = None, init_prior({name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}, blocks)
        for step in range(4):
            trees = contributions(step)
            expected = pcr_core.resolve(*map(dense, trees), group_ids=IDS, rule=RULE, sizes=blocks.sizes, state=state)
            state = expected.state
            stats = expected.statistics
            noise = Scatter(
                *(jnp.asarray(x, dtype) for x in (stats.plasticity_var, stats.stability_var, stats.covariance))
            )
            p, s = ({name: jnp.asarray(x.sum(0), dtype) for name, x in tree.items()} for tree in trees)
            update, report = form(p, s, noise, RULE, blocks=blocks, prior=prior)
            prior = report.prior
            got = np.concatenate([np.asarray(update[name]).reshape(-1) for name in ("a", "b")])
            ok = np.isfinite(expected.update)
            assert ok.all() == (step != 2)
            np.testing.assert_array_equal(np.isfinite(got), ok)
            assert relative(got[ok], expected.update[ok]) <= bound
            assert report.weights.finite.tolist() == [step != 2, True]
            for name in ("plasticity_mean", "stability_mean"):
                mean = np.concatenate([np.asarray(x).reshape(-1) for x in getattr(prior, name)])
                assert relative(mean, getattr(state, name)) <= bound
            assert relative(prior.plasticity_var, state.plasticity_var) <= bound
            np.testing.assert_array_equal(update["c"], p["c"] + s["c"])  # outside the blocks there is no prior


def rollouts(seed: int, dtype: str) -> Rollouts:
    data = tiny.rollouts(groups=2, seed=seed, dtype=dtype)
    return Rollouts({"tokens": data.pop("tokens")}, **data)


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float64", 1e-10), pytest.param("float32", 1e-4, marks=pytest.mark.slow)]
)
def test_steps_agree_with_pcr_torch(dtype: str, bound: float) -> None:
    torch = pytest.importorskip("torch")
    from test_jax_torch_agree import Model, as_tree

    from pcr_torch import PCR

    weights, rate = tiny.parameters(dtype=dtype), 0.1
    model = Model(weights)
    method = PCR(model, rule=RULE)
    sgd = torch.optim.SGD(model.parameters(), lr=rate)
    with jax.enable_x64(dtype == "float64"):
        params = tiny.on_device(weights)
        state = init_state(params, optax.sgd(rate), RULE)
        step = make_train_step(
            tiny.forward, optax.sgd(rate), group_size=GROUP, beta=BETA, normalization="dapo", rule=RULE
        )
        for seed in range(3):
            data = rollouts(seed, dtype)
            before = jax.tree.map(np.asarray, state.params)
            state, report = step(state, data)

            rows = {name: torch.from_numpy(np.array(getattr(data, name))) for name in ("logp_old", "logp_ref", "mask")}
            logp = model(torch.from_numpy(data.inputs["tokens"]).long())
            lost = pcr_core.grpo_objective(
                logp.detach(),
                advantages=torch.from_numpy(data.advantages),
                beta=BETA,
                normalization="dapo",
                **rows,
            )
            sgd.zero_grad()
            method.accumulate(logp, lost, group_ids=torch.arange(2).repeat_interleave(GROUP))
            reference = method.resolve()
            sgd.step()
            order = [
                [block.parameters[0] for block in reference.blocks].index(f"{name.replace('/', '.')}.weight")
                for name in report.resolution.blocks.names
            ]
            alpha = reference.weights.alpha.numpy()[order]
            np.testing.assert_allclose(report.resolution.weights.alpha, alpha, rtol=10 * bound)
            update = jax.tree.map(lambda old, new: (old - new) / rate, before, state.params)
            for got, want in zip(jax.tree.leaves(update), jax.tree.leaves(as_tree(model)), strict=True):
                assert relative(got, want) <= 10 * bound
        kept = method.state_dict()["prior"]
        for stream in ("plasticity", "stability"):
            variance = kept[stream]["variance"].numpy()[order]
            np.testing.assert_allclose(getattr(state.prior, f"{stream}_var"), variance, rtol=10 * bound)
    method.remove()


def test_bad_input_is_named() -> None:
    params = {"w": jnp.ones((2, 2)), "v": jnp.ones(3)}
    blocks = select_blocks(params, "w")
    prior = init_prior(params, blocks)
    noise = Scatter(jnp.ones(1), jnp.ones(1), jnp.zeros(1))
    longer = init_prior(params, select_blocks(params, "all"))

    def call(rule: Any, prior: Any) -> Any:
        return resolve(params, params, noise, rule, blocks=blocks, prior=prior)

    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "prior: TemporalPrior keeps state; give", lambda: call(RULE, None)),
        (ValueError, "prior: only PCR with TemporalPrior", lambda: call(pcr_core.PCR(alpha="variance"), prior)),
        (TypeError, "prior: expected a PriorState", lambda: call(RULE, {})),
        (ValueError, "prior: plasticity_mean has arrays of shapes", lambda: call(RULE, longer)),
        (
            ValueError,
            r"prior: plasticity_var has shape \(2,\), there are 1 blocks",
            lambda: call(
                RULE, pcr_core.PriorState(prior.plasticity_mean, prior.stability_mean, jnp.ones(2), jnp.ones(2))
            ),
        ),
    ]
    for kind, message, run in cases:
        with pytest.raises(kind, match=message):
            run()
    sgd = optax.sgd(1.0)
    step = make_train_step(tiny.forward, sgd, group_size=GROUP, beta=BETA, rule=RULE)
    with pytest.raises(ValueError, match="state: TemporalPrior keeps state"):
        step(init_state(tiny.on_device(tiny.parameters()), sgd), rollouts(0, "float32"))


def test_half_precision_gradients_keep_their_dtype_and_wide_means() -> None:
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    blocks = select_blocks(params, "all")
    noise = Scatter(jnp.ones(1), jnp.ones(1), jnp.zeros(1))
    update, report = resolve(params, params, noise, RULE, blocks=blocks, prior=init_prior(params, blocks))
    assert update["w"].dtype == jnp.bfloat16
    assert report.prior is not None
    assert report.prior.plasticity_mean[0].dtype == jnp.float32
