"""A train step on four host devices in each layout, beside the same on one; run by `test_jax_sharding.py`.

Its own process, since JAX fixes the number of devices when it starts. Prints a JSON record a layout.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # four devices of the host, whatever else there is
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np
import optax
import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pcr_core
from pcr_jax import Rollouts, init_state, make_train_step

COLLECTIVE = re.compile(r" = (\(?\w+\[.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)[-(]")


def replicated(path: str) -> P:
    return P()


def fully_sharded(path: str) -> P:
    return P("data")


def tensor_parallel(path: str) -> P:
    return P(None, "model") if path.endswith("up']") else P("model", None) if path.endswith("down']") else P()


def both(path: str) -> P:
    """One of the two blocks is on one model axis as well, the other is not."""
    return P("data", "model") if path.endswith("up']") else P("data")


# name: shape of the mesh ("data", "model"), where a leaf lies, axes of the rollouts, kind of the axes
LAYOUTS: dict[str, Any] = {
    "data": ((4, 1), replicated, "data", AxisType.Auto),
    "fsdp": ((4, 1), fully_sharded, "data", AxisType.Auto),
    "tensor": ((1, 4), tensor_parallel, (), AxisType.Auto),
    "data_tensor": ((2, 2), tensor_parallel, "data", AxisType.Auto),
    "fsdp_tensor": ((2, 2), both, "data", AxisType.Auto),
    "zero": ((4, 1), replicated, "data", AxisType.Auto),
    "hybrid": ((2, 2), fully_sharded, ("data", "model"), AxisType.Auto),
    "constrained": ((2, 2), tensor_parallel, "data", AxisType.Auto),
    "mapped": ((2, 2), tensor_parallel, "data", AxisType.Auto),
    "without_noise": ((2, 2), both, "data", AxisType.Auto),
    "constrained_without_noise": ((2, 2), tensor_parallel, "data", AxisType.Auto),
    "explicit": ((2, 2), fully_sharded, ("data", "model"), AxisType.Explicit),
}


TEMPORAL = ("fsdp_tensor", "zero")  # the others have no prior


def constrained(mesh: Any) -> Any:
    """`tiny.forward`, which tells how its activations lie on the whole mesh, in remat and jit."""

    def at(x: Any, *spec: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def product(x: Any, kernel: Any) -> Any:
        return at(x @ kernel, "data", None, "model" if kernel.shape[1] > kernel.shape[0] else None)

    def forward(params: Any, rows: Any) -> Any:
        h = at(params["embed"][rows["tokens"]], ("data",))
        for weights in params["layers"]:
            h = at(jax.checkpoint(jax.jit(lambda h, w: tiny.layer(h, w, product)))(h, weights), "data", None, None)
        return tiny.logp(h, params["head"], rows["tokens"])

    return forward


def mapped(mesh: Any) -> Any:
    """`tiny.forward`, its MLP by a shard_map of its own over the model axis, on the mesh of the context."""

    def mlp(x: Any, up: Any, down: Any) -> Any:
        return jax.lax.psum(jax.numpy.tanh(x @ up) @ down, "model")

    split = jax.shard_map(mlp, in_specs=(P(), P(None, "model"), P("model", None)), out_specs=P(), axis_names={"model"})

    def forward(params: Any, rows: Any) -> Any:
        h = params["embed"][rows["tokens"]]
        for weights in params["layers"]:
            h = h + tiny.attention(h, weights["attn"])
            h = h + split(tiny.norm(h), weights["mlp"]["up"], weights["mlp"]["down"])
        return tiny.logp(h, params["head"], rows["tokens"])

    return forward


def run(layout: str | None, rule: Any, norms: Any, dtype: str, sizes: dict[str, int]) -> tuple[Any, str, bool]:
    """State and report after two steps, the compiled text, and whether the state lies as before."""
    length = sizes.pop("length")
    params = tiny.on_device(tiny.parameters(vocabulary=32, dtype=dtype, **sizes))
    data = tiny.rollouts(groups=4, vocabulary=32, length=length, dtype=dtype)
    rollouts = Rollouts({"tokens": data.pop("tokens")}, **data)
    optimizer = optax.sgd(0.01, momentum=0.9)  # momentum is the updates themselves
    options: dict[str, Any] = {"group_size": tiny.GROUP, "beta": tiny.BETA, "norms": norms, "rule": rule}
    logp_fn = tiny.forward
    if not pcr_core.needs_noise(rule):
        options["noise_every"] = 0
    if layout is not None:
        shape, spec, options["data_axis"], kind = LAYOUTS[layout]
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind,) * 2)
        place = jax.tree_util.tree_map_with_path(
            lambda path, x: NamedSharding(mesh, spec(jax.tree_util.keystr(path))), params
        )
        params = jax.device_put(params, place)
        jax.set_mesh(mesh)
        written = next((model for model in (constrained, mapped) if layout.startswith(model.__name__)), None)
        logp_fn = tiny.forward if written is None else written(mesh)
    state = init_state(params, optimizer, rule)
    if layout == "zero":  # each device keeps a part of the momentum
        state = replace(state, optimizer=jax.device_put(state.optimizer, NamedSharding(mesh, P("data"))))
    before = jax.tree.map(lambda x: x.sharding, state)
    if layout is not None:
        options["shardings"] = before
    step: Any = make_train_step(logp_fn, optimizer, **options)
    text = step.lower(state, rollouts).compile().as_text()
    for _ in range(2):
        state, report = step(state, rollouts)
    return jax.device_get((state, report)), text, jax.tree.map(lambda x: x.sharding, state) == before


def errors(got: Any, expected: Any) -> dict[str, float]:
    """The largest relative errors; of sums that cancel, relative to what was added."""
    (state, report), (other, reference) = got, expected
    found = {
        name: max(tiny.relative(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))
        for name, one, two in (("update", state.optimizer, other.optimizer), ("prior", state.prior, other.prior))
        if one is not None
    }
    for name in ("plasticity_loss", "stability_loss", "kl", "clip_fraction"):
        one, two = getattr(report, name), getattr(reference, name)
        found[name] = float(abs(one - two) / (abs(two) or 1.0))
    one, two = report.resolution.statistics, reference.resolution.statistics
    scales = {"dot": ("plasticity_sq", "stability_sq"), "covariance": ("plasticity_var", "stability_var")}
    for name in pcr_core.BlockStatistics.__dataclass_fields__:
        if getattr(two, name) is None:
            continue
        a, b = (np.asarray(getattr(x, name), dtype="float64") for x in (one, two))
        p, s = (np.asarray(getattr(two, scale), dtype="float64") for scale in scales.get(name, (name, name)))
        found[name] = float(np.max(np.abs(a - b) / np.sqrt(p * s)))
    for name in pcr_core.Weights.__dataclass_fields__:
        if getattr(reference.resolution.weights, name) is None:
            continue
        a, b = (np.asarray(getattr(x.resolution.weights, name), dtype="float64") for x in (report, reference))
        found[name] = float(np.max(np.abs(a - b) / np.maximum(1.0, np.abs(b))))
    return found


def main(norms: str, dtype: str, width: str, names: list[str]) -> None:
    jax.config.update("jax_enable_x64", dtype == "float64")
    small = {"width": 8, "hidden": 12, "length": 5}
    sizes = small if width == "tiny" else {"width": 512, "hidden": 1536, "length": 125}
    rules = {
        name: pcr_core.PCR()
        if name.endswith("without_noise")
        else pcr_core.PCR(alpha="variance", prior=pcr_core.TemporalPrior())
        if name in TEMPORAL
        else pcr_core.PCR(alpha="variance")
        for name in names
    }
    expected = {rule: run(None, rule, norms, dtype, dict(sizes))[0] for rule in set(rules.values())}
    for name, rule in rules.items():
        got, text, kept = run(name, rule, norms, dtype, dict(sizes))
        found = COLLECTIVE.findall(text)
        record = {
            "layout": name,
            "path": got[1].path,
            "errors": errors(got, expected[rule]),
            "kept": kept,
            "collectives": Counter(kind for _, kind in found),
            "gathered": [shape.split("{")[0] for shape, kind in found if kind == "all-gather"],
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:])
