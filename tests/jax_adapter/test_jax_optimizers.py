"""Optimizers in a compiled step: those that keep the first parameters, those that read the loss, and others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny
from flax import nnx
from test_jax_train_step import rollouts

from pcr_jax import Rollouts, init_state, make_train_step

OPTIONS: dict[str, Any] = {"group_size": tiny.GROUP, "beta": tiny.BETA, "noise_every": 0}


def average_kept() -> Any:
    """An optimizer of one's own that keeps the first parameters in its state."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda u: -0.1 * u, updates), jax.tree.map(lambda a, p: (a + p) / 2, state, params)

    return optax.GradientTransformation(lambda params: params, update)


MAKE = {
    "prodigy": optax.contrib.prodigy,
    "cocob": optax.contrib.cocob,
    "average of its own": average_kept,
    "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    "polyak_sgd": lambda: optax.polyak_sgd(max_learning_rate=0.1),
}


@pytest.mark.parametrize("name", MAKE)
def test_it_takes_two_steps(name: str) -> None:
    optimizer = MAKE[name]()
    params = tiny.on_device(tiny.parameters())
    step: Any = make_train_step(tiny.forward, optimizer, **OPTIONS)
    state = init_state(params, optimizer)
    for seed in range(2):
        state, _ = step(state, rollouts(seed))
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), state.params, params)
    assert all(jax.tree.leaves(moved))


def test_the_loss_that_an_optimizer_reads_is_that_of_both_streams() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> Any:
        return updates, value

    optimizer = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    state = init_state(tiny.on_device(tiny.parameters()), optimizer)
    state, report = make_train_step(tiny.forward, optimizer, **OPTIONS)(state, rollouts())
    assert float(state.optimizer) == pytest.approx(float(report.plasticity_loss + report.stability_loss))


def test_what_comes_too_late_or_is_no_transformation_is_refused() -> None:
    several = optax.MultiSteps(optax.sgd(0.1), 2)
    with pytest.raises(ValueError, match="MultiSteps accumulates updates that are resolved already"):
        make_train_step(tiny.forward, several, **OPTIONS)
    hidden = several.gradient_transformation()
    full = tiny.on_device(tiny.parameters())
    with pytest.raises(ValueError, match="MultiSteps accumulates updates that are resolved already"):
        make_train_step(tiny.forward, hidden, **OPTIONS)(init_state(full, hidden), rollouts())
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"give its optax transformation \(optimizer.tx\)"):
        make_train_step(tiny.forward, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), **OPTIONS)
    with pytest.raises(TypeError, match=r"expected an optax\.GradientTransformation, got float"):
        make_train_step(tiny.forward, 0.1, **OPTIONS)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dropout: float | None = None) -> None:
        self.up = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = None if dropout is None else nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return jax.nn.log_softmax(self.up(x))[..., 0]


def test_a_module_is_a_tree_of_parameters() -> None:
    optimizer, model = optax.adam(0.1), Net(nnx.Rngs(0))
    step: Any = make_train_step(lambda model, x: model(x), optimizer, group_size=2, beta=0.1, blocks="all")
    x, old = jax.random.normal(jax.random.key(0), (4, 3, 4)), jnp.full((4, 3), -1.0)
    scored = Rollouts(x, old, old - 0.1, jnp.asarray([1.0, -1.0, 1.0, -1.0]), jnp.ones((4, 3), bool))
    state, report = step(init_state(model, optimizer), scored)
    assert isinstance(state.params, Net)
    assert report.path == "fast"
    assert state.params(x).shape == (4, 3)


def test_random_keys_among_the_parameters_are_named_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"params: dropout/rngs/.* expected a floating array; .*nnx.split\(model"):
        init_state(Net(nnx.Rngs(0), dropout=0.1), optax.sgd(0.1))
