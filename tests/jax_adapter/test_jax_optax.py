"""`resolving` in optax chains: equal to `resolve` before the optimizer, and what wrappers make of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pcr_core
from pcr_core import Scatter
from pcr_jax import Rollouts, dense, init_prior, init_state, make_train_step, resolve, resolving, select_blocks

RULES = [pcr_core.PCR(alpha=0.5), pcr_core.PCR(alpha="variance", prior=pcr_core.TemporalPrior()), pcr_core.PCGrad()]
PARAMS = {"a": jnp.ones((3, 2)), "b": jnp.ones(4), "c": jnp.ones(2)}
BLOCKS = select_blocks(PARAMS, "[ab]")


def gradients(seed: int) -> tuple[Any, Any, Scatter[Any]]:
    """P, S in conflict with it, and the scatter."""
    rng = np.random.default_rng(seed)
    p = {name: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for name, x in PARAMS.items()}
    s = {name: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) - 0.5 * x for name, x in p.items()}
    return p, s, Scatter(*(jnp.asarray(rng.random(2), jnp.float32) for _ in range(2)), jnp.zeros(2))


def assert_trees_equal(got: Any, expected: Any, rtol: float = 1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), got, expected)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_in_a_chain_it_is_resolve_before_the_optimizer(rule: Any, compiled: bool) -> None:
    adam = optax.adam(0.1)
    chain = optax.chain(resolving(rule, "[ab]"), adam)
    update = jax.jit(chain.update) if compiled else chain.update
    state, expected_state, prior = chain.init(PARAMS), adam.init(PARAMS), None
    if isinstance(rule, pcr_core.PCR) and isinstance(rule.prior, pcr_core.TemporalPrior):
        prior = init_prior(PARAMS, BLOCKS)
    assert np.isnan(state[0].report.weights.alpha).all()
    for seed in range(3):
        p, s, noise = gradients(seed)
        resolved, report = resolve(p, s, noise, rule, blocks=BLOCKS, prior=prior)
        prior = report.prior
        expected, expected_state = adam.update(resolved, expected_state, PARAMS)
        got, state = update(p, state, PARAMS, stability=s, statistics=noise)
        assert_trees_equal(got, expected, 1e-5)
        assert_trees_equal(state[0].report.weights, report.weights)
        assert state[0].report.blocks == BLOCKS


@pytest.mark.parametrize("compiled", [False, True])
def test_multi_steps_is_refused(compiled: bool) -> None:
    optimizer = optax.MultiSteps(optax.chain(resolving(blocks="[ab]"), optax.sgd(1.0)), every_k_schedule=2)
    update = jax.jit(optimizer.update) if compiled else optimizer.update
    p, s, noise = gradients(0)
    with pytest.raises(ValueError, match=r"stability: computed outside .* optax\.MultiSteps"):
        update(p, optimizer.init(PARAMS), PARAMS, stability=s, statistics=noise)


def test_multi_steps_would_use_the_last_stability_only(monkeypatch: Any) -> None:
    """What the refusal prevents."""
    monkeypatch.setattr("pcr_jax.gradient_transformation._traces", lambda tree: set())
    optimizer = optax.MultiSteps(resolving(blocks="[ab]"), every_k_schedule=2, use_grad_mean=False)
    state = optimizer.init(PARAMS)
    batches = [gradients(0), gradients(1)]
    for p, s, noise in batches:
        got, state = optimizer.update(p, state, PARAMS, stability=s, statistics=noise)
    (p, s, noise), (q, t, other) = batches
    total = jax.tree.map(jnp.add, p, q)
    assert_trees_equal(got, resolve(total, t, other, blocks=BLOCKS)[0], 1e-5)
    right, _ = resolve(total, jax.tree.map(jnp.add, s, t), pcr_core.merge(noise, other), blocks=BLOCKS)
    assert all(float(jnp.abs(x - y).max()) > 0.1 for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(right)))


def logp_fn(params: Any, x: Any) -> Any:
    return jax.nn.log_softmax(dense(x, params["w"]))[..., 0]


def rollouts(seed: int) -> Rollouts:
    rng = np.random.default_rng(seed)
    old, advantages = (rng.standard_normal(shape).astype("float32") for shape in ((4, 2), (4,)))
    return Rollouts(rng.random((4, 2, 3), dtype="float32"), old, old - 0.5, advantages, np.ones((4, 2), dtype=bool))


def test_inside_a_train_step_it_says_that_it_is_not_needed() -> None:
    optimizer = optax.chain(resolving(blocks="all"), optax.sgd(1.0))
    step = make_train_step(logp_fn, optimizer, group_size=2, beta=0.1, blocks="all")
    with pytest.raises(TypeError, match=r"stability: .* make_train_step is given"):
        step(init_state({"w": jnp.eye(3)}, optimizer), rollouts(0))


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda tx: optax.masked(tx, {"a": True, "b": True, "c": False}),
        lambda tx: optax.masked(tx, {"a": True, "b": True, "c": False}, mask_compatible_extra_args=True),
        lambda tx: optax.partition({"on": tx, "off": optax.sgd(1.0)}, {"a": "on", "b": "on", "c": "off"}),
    ],
    ids=["masked", "masked_extra_args", "partition"],
)
def test_masked_and_partition_around_it_are_refused(wrapped: Any) -> None:
    with pytest.raises(ValueError, match=r"resolving: some leaves are masked.*chain\(resolving"):
        wrapped(resolving(blocks="[ab]")).init(PARAMS)


def test_masked_and_partition_after_it_are_right() -> None:
    p, s, noise = gradients(0)
    expected, _ = resolve(p, s, noise, blocks=BLOCKS)
    frozen = optax.partition({"on": optax.sgd(1.0), "off": optax.set_to_zero()}, {"a": "on", "b": "off", "c": "on"})
    optimizer = optax.chain(resolving(blocks="[ab]"), frozen)
    got, _ = optimizer.update(p, optimizer.init(PARAMS), PARAMS, stability=s, statistics=noise)
    assert_trees_equal(got, {name: 0 * x if name == "b" else -x for name, x in expected.items()})


def test_what_stands_before_it_changes_plasticity_alone() -> None:
    """Not detected, so documented."""
    p, s, noise = gradients(0)
    chain = optax.chain(optax.scale(0.1), resolving(blocks="[ab]"))
    got, _ = chain.update(p, chain.init(PARAMS), PARAMS, stability=s, statistics=noise)
    smaller = jax.tree.map(lambda x: 0.1 * x, p)
    assert_trees_equal(got, resolve(smaller, s, noise, blocks=BLOCKS)[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_apply_if_finite_around_it_skips_a_step_that_is_not_finite(compiled: bool) -> None:
    optimizer = optax.apply_if_finite(resolving(blocks="[ab]"), max_consecutive_errors=3)
    update = jax.jit(optimizer.update) if compiled else optimizer.update
    p, s, noise = gradients(0)
    got, state = update(p, optimizer.init(PARAMS), PARAMS, stability=s, statistics=noise)
    assert_trees_equal(got, resolve(p, s, noise, blocks=BLOCKS)[0])
    got, _ = update({**p, "a": p["a"] * jnp.nan}, state, PARAMS, stability=s, statistics=noise)
    assert_trees_equal(got, jax.tree.map(jnp.zeros_like, p))


def test_bad_input_is_named() -> None:
    tx = resolving(blocks="[ab]")
    p, s, noise = gradients(0)
    state = tx.init(PARAMS)
    for missing in ("stability", "statistics"):
        arguments = {"stability": s, "statistics": noise, missing: None}
        with pytest.raises(TypeError, match=f"{missing}: update"):
            tx.update(p, state, PARAMS, **arguments)
    with pytest.raises(ValueError, match="blocks: 'ffn' matches no floating leaf"):
        resolving(blocks="ffn").init(PARAMS)
