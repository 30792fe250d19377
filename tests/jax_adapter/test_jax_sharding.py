"""Steps on four devices take the step of one, keep the layout of the state, and gather no activations or gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pcr_jax import Rollouts, init_state, make_train_step

FAST = ("data", "fsdp", "fsdp_tensor", "constrained", "without_noise")
SLOW = ("tensor", "data_tensor", "zero", "hybrid", "mapped", "constrained_without_noise", "explicit")
LEAVES, BLOCKS = 6, 2  # of the tiny model


@cache
def measure(norms: str, dtype: str, sizes: str, layouts: tuple[str, ...]) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).parent / "layouts.py"), norms, dtype, sizes, *layouts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-3000:]
    return {record["layout"]: record for record in map(json.loads, done.stdout.splitlines())}


def of(layout: str) -> Any:
    return measure("fast", "float32", "tiny", FAST if layout in FAST else SLOW)[layout]


every_layout = pytest.mark.parametrize("layout", [*FAST, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)])


@every_layout
def test_equals_one_device_and_keeps_the_layout(layout: str) -> None:
    record = of(layout)
    assert {name: error for name, error in record["errors"].items() if not error <= 1e-6} == {}
    assert record["kept"]
    assert record["path"] == ("autograd" if layout.endswith("without_noise") else "fast")


def test_constraints_of_the_model_are_kept_on_the_other_axes() -> None:
    """As the same layout without them, its activations are summed over the model axis, and nothing is gathered."""
    assert set(of("constrained")["collectives"]) == {"all-reduce"}


def test_data_parallel_sums_gradients_and_gathers_nothing() -> None:
    """XLA combines all sums, of gradients and statistics; at worst they are one each."""
    collectives = of("data")["collectives"]
    assert set(collectives) == {"all-reduce"}
    assert collectives["all-reduce"] <= 2 * LEAVES + 5


def test_fsdp_gathers_each_parameter_and_scatters_each_gradient_once_a_pass() -> None:
    collectives = of("fsdp")["collectives"]
    assert collectives["all-gather"] == LEAVES
    assert collectives["reduce-scatter"] == LEAVES + BLOCKS  # of other parameters the sum of both streams
    assert set(collectives) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert collectives["all-reduce"] <= 5


def test_a_kernel_split_both_ways_is_gathered_along_the_data_axis_only() -> None:
    record = of("fsdp_tensor")
    assert record["collectives"]["all-gather"] == LEAVES + 1  # and the split layer's output, for the one that is not
    assert record["collectives"]["reduce-scatter"] == LEAVES + BLOCKS
    assert "f32[8,6]" in record["gathered"]
    assert "f32[8,12]" not in record["gathered"]


@pytest.mark.slow
def test_tensor_parallel_adds_the_products_of_all_responses_at_once() -> None:
    """A sum in the forward pass and one in each pullback, as in any tensor-parallel MLP, and one or two of products."""
    collectives = of("tensor")["collectives"]
    assert set(collectives) == {"all-reduce"}
    assert collectives["all-reduce"] <= 3 + 2


@pytest.mark.slow
@pytest.mark.parametrize(("norms", "dtype", "bound"), [("loop", "float32", 1e-6), ("fast", "float64", 1e-12)])
def test_the_loop_and_float64(norms: str, dtype: str, bound: float) -> None:
    for record in measure(norms, dtype, "tiny", ("fsdp", "fsdp_tensor")).values():
        assert {name: error for name, error in record["errors"].items() if not error <= bound} == {}
        assert record["kept"]


@pytest.mark.slow
def test_realistic_sizes() -> None:
    for record in measure("fast", "float32", "realistic", ("data", "fsdp_tensor", "tensor")).values():
        assert {name: error for name, error in record["errors"].items() if not error <= 1e-6} == {}


def one_device_mesh(axis: str = "data") -> Mesh:
    return jax.make_mesh((1,), (axis,), axis_types=(jax.sharding.AxisType.Auto,))


def step_on(shardings: Any, **options: Any) -> Any:
    options = {"group_size": tiny.GROUP, "beta": tiny.BETA, **options}
    return make_train_step(tiny.forward, optax.sgd(1.0), shardings=shardings, **options)


def test_bad_layouts_are_refused_with_the_reason() -> None:
    params = tiny.on_device(tiny.parameters())
    mesh = one_device_mesh()
    state = init_state(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), optax.sgd(1.0))
    where = jax.tree.map(lambda x: x.sharding, state)
    elsewhere = NamedSharding(one_device_mesh("rows"), PartitionSpec())
    alone = jax.tree.map(lambda x: SingleDeviceSharding(jax.devices()[0]), state)
    mixed = jax.tree.map(lambda x: x, where)
    mixed.params["head"] = elsewhere
    both = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    together = jax.tree.map(lambda x: NamedSharding(both, PartitionSpec()), where)
    together.params["head"] = NamedSharding(both, PartitionSpec(None, ("model", "data")))
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, "shardings: embed is a SingleDeviceSharding, expected a NamedSharding", lambda: step_on(alone)),
        (ValueError, "shardings: head is on another mesh than embed", lambda: step_on(mixed)),
        (ValueError, "data_axis: 'batch' is not one of the mesh's axes", lambda: step_on(where, data_axis="batch")),
        (TypeError, "shardings: expected a TrainState", lambda: step_on(where.params)),
        (ValueError, "one dimension of head is split over", lambda: step_on(together)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    data = tiny.rollouts(groups=4)
    rollouts = Rollouts({"tokens": data.pop("tokens")}, **data)
    with pytest.raises(ValueError, match="rollouts: 10 responses over 1 data shards are not whole groups of 3"):
        step_on(where)(state, jax.tree.map(lambda x: x[:10], rollouts))
    adam = jax.tree.map(lambda x: x.sharding, init_state(state.params, optax.adam(1.0)))
    with pytest.raises(ValueError, match="shardings: not a tree like the state"):
        step_on(adam)(state, rollouts)


def a_bare_spec(mesh: Mesh, x: Any) -> Any:
    return jax.lax.with_sharding_constraint(x, PartitionSpec("data"))


def a_map_over_the_data_axis(mesh: Mesh, x: Any) -> Any:
    return jax.shard_map(lambda x: x, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))(x)


@pytest.mark.parametrize(
    ("inside", "hint"),
    [
        (a_bare_spec, r"have to be NamedSharding\(mesh, spec\)"),
        (a_map_over_the_data_axis, "may map over the other axes only"),
    ],
)
def test_what_a_model_may_not_say_on_one_data_shard_is_named(inside: Any, hint: str) -> None:
    mesh = one_device_mesh()
    params = jax.device_put(tiny.on_device(tiny.parameters()), NamedSharding(mesh, PartitionSpec()))
    state = init_state(params, optax.sgd(1.0))
    step: Any = make_train_step(
        lambda params, rows: inside(mesh, tiny.forward(params, rows)),
        optax.sgd(1.0),
        group_size=tiny.GROUP,
        beta=tiny.BETA,
        shardings=jax.tree.map(lambda x: x.sharding, state),
    )
    data = tiny.rollouts(groups=4)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=f"logp_fn runs on one data shard, .*{hint}"):
        step.lower(state, Rollouts({"tokens": data.pop("tokens")}, **data))


def test_the_whole_state_is_put_where_the_parameters_are() -> None:
    mesh = one_device_mesh()
    params = jax.device_put({"w": jnp.ones((4, 4))}, NamedSharding(mesh, PartitionSpec("data")))
    state = init_state(params, optax.adam(1.0))
    assert {x.sharding.mesh for x in jax.tree.leaves(state)} == {mesh}
    assert state.optimizer[0].mu["w"].sharding == params["w"].sharding
    np.testing.assert_array_equal(state.params["w"], params["w"])
