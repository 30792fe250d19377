"""One transformer in two frameworks: the same weights and batch give the same decision and update."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import tiny
from tiny import BETA, GROUP, PROMPT, assert_statistics_close, relative

import pcr_core
from pcr_conformance import oracle
from pcr_conformance.cases import Case
from pcr_conformance.rounding import Arithmetic
from pcr_conformance.tolerances import errors, update_bounds
from pcr_jax import pullback, resolve, select_blocks

torch = pytest.importorskip("torch")
nn = torch.nn


class Layer(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: linear(w) for name, w in weights["attn"].items()})
        self.mlp = nn.ModuleDict({name: linear(w) for name, w in weights["mlp"].items()})

    def forward(self, h: Any) -> Any:
        q, k, v = self.attn["qkv"](norm(h)).chunk(3, dim=-1)
        causal = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
        scores = torch.where(causal, q @ k.mT / h.shape[-1] ** 0.5, -1e9)
        h = h + self.attn["out"](scores.softmax(-1) @ v)
        return h + self.mlp["down"](torch.tanh(self.mlp["up"](norm(h))))


class Model(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.from_numpy(weights["embed"]))
        self.layers = nn.ModuleList([Layer(layer) for layer in weights["layers"]])
        self.head = linear(weights["head"])

    def forward(self, tokens: Any) -> Any:
        h = self.embed[tokens]
        for layer in self.layers:
            h = layer(h)
        logp = self.head(norm(h)).log_softmax(-1)[:, PROMPT - 1 : -1]
        return logp.gather(-1, tokens[:, PROMPT:, None])[..., 0]


def linear(weight: Any) -> Any:
    layer = nn.Linear(*weight.shape, bias=False)
    layer.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(weight.T)))
    return layer


def norm(h: Any) -> Any:
    return h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def as_tree(model: Any, named: Any = None) -> Any:
    """`.grad`, or tensors by name, as the JAX parameters are laid out."""
    named = {name: p.grad for name, p in model.named_parameters()} if named is None else named

    def matrix(name: str) -> Any:
        return named[f"{name}.weight"].numpy().T

    return {
        "embed": named["embed"].numpy(),
        "layers": [
            {
                part: {name: matrix(f"layers.{k}.{part}.{name}") for name in getattr(layer, part)}
                for part in ("attn", "mlp")
            }
            for k, layer in enumerate(model.layers)
        ],
        "head": matrix("head"),
    }


RULE = pcr_core.PCR(alpha="snr", gate="probability")


def problem(dtype: str) -> tuple[Any, Any]:
    """Two of the four blocks in conflict, and plasticity so large that this shows in the update."""
    batch = tiny.rollouts(dtype=dtype, seed=4)
    return tiny.parameters(layers=2, dtype=dtype), {**batch, "advantages": 10 * batch["advantages"]}


def by_torch(dtype: str, norms: Any) -> dict[str, Any]:
    """What pcr_torch computes, and the totals and contributions by torch's autograd alone, laid out as in JAX."""
    from pcr_torch import PCR

    weights, batch = problem(dtype)
    model = Model(weights)
    method = PCR(model, rule=RULE, norms=norms)
    rows = {name: torch.from_numpy(np.array(x)) for name, x in batch.items()}
    logp = model(rows["tokens"].long())
    lost = pcr_core.grpo_objective(
        logp.detach(),
        *(rows[name] for name in ("logp_old", "logp_ref", "advantages", "mask")),
        beta=BETA,
        normalization="dapo",
        normalizer=tiny.tokens_in(batch),
    )
    found: dict[str, Any] = {"objective": lost, "logp": logp.detach().numpy()}
    every_row = torch.eye(len(logp), dtype=logp.dtype)[:, :, None]
    for stream in ("plasticity", "stability"):
        w = getattr(lost, f"{stream}_cotangent")
        found[f"{stream}_rows"] = [as_tree(model, gradients(model, logp, w * row)) for row in every_row]
        found[stream] = as_tree(model, gradients(model, logp, w))
    method.accumulate(logp, lost, group_ids=torch.arange(2).repeat_interleave(GROUP))
    report = method.resolve()
    method.remove()
    blocks = select_blocks(weights)
    names = [block.parameters[0] for block in report.blocks]
    order = [names.index(f"{name.replace('/', '.')}.weight") for name in blocks.names]
    for record in ("statistics", "weights"):
        value = getattr(report, record)
        found[record] = type(value)(*(getattr(value, f).numpy()[order] for f in type(value).__dataclass_fields__))
    return {**found, **sums_outside(found, blocks), "update": as_tree(model), "blocks": blocks}


def sums_outside(found: dict[str, Any], blocks: Any) -> dict[str, Any]:
    """Both totals as `Pulled` has them: outside the blocks the first is P + S, the second zero."""
    (p, structure), (s, _) = (jax.tree.flatten(found[stream]) for stream in ("plasticity", "stability"))
    outside = [block is None for block in blocks.of_leaf]
    return {
        "plasticity": jax.tree.unflatten(structure, [x + y if out else x for x, y, out in zip(p, s, outside)]),
        "stability": jax.tree.unflatten(structure, [0 * y if out else y for y, out in zip(s, outside)]),
    }


def gradients(model: Any, logp: Any, cotangent: Any) -> Any:
    return dict(
        zip(model.state_dict(), torch.autograd.grad(logp, list(model.parameters()), cotangent, retain_graph=True))
    )


def by_jax(dtype: str, norms: Any) -> tuple[Any, Any, Any, Any]:
    """Pulled, objective, update and report, compiled."""
    weights, batch = problem(dtype)
    of_rows = tiny.objective(tiny.tokens_in(batch))

    def run(params: Any, data: Any) -> Any:
        blocks = select_blocks(params)
        pulled = pullback(tiny.forward, params, data, of_rows, blocks=blocks, group_size=GROUP, norms=norms)
        update, report = resolve(pulled.plasticity, pulled.stability, pulled.scatter(), RULE, blocks=blocks)
        return pulled, of_rows(pulled.logp, data), update, report

    with jax.enable_x64(dtype == "float64"):
        return jax.device_get(jax.jit(run)(*map(tiny.on_device, (weights, batch))))  # type: ignore[no-any-return]


def assert_trees_close(got: Any, expected: Any, bound: float) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative(x, y) <= bound


@pytest.mark.parametrize("norms", ["fast", "loop"])
def test_all_numbers_agree_in_float64(norms: Any) -> None:
    bound = 1e-10
    other = by_torch("float64", norms)
    pulled, objective, update, report = by_jax("float64", norms)
    assert relative(pulled.logp, other["logp"]) <= bound
    for name in pcr_core.Objective.__dataclass_fields__:
        assert relative(getattr(objective, name), getattr(other["objective"], name).numpy()) <= bound, name
    assert_trees_close(pulled.plasticity, other["plasticity"], bound)
    assert_trees_close(pulled.stability, other["stability"], bound)
    assert_statistics_close(report.statistics, other["statistics"], bound)
    for name in pcr_core.Weights.__dataclass_fields__:
        got, expected = (np.asarray(getattr(x, name), dtype="float64") for x in (report.weights, other["weights"]))
        np.testing.assert_allclose(got, expected, rtol=bound, atol=bound, err_msg=name)
    assert_trees_close(update, other["update"], bound)
    conflict = report.weights.conflict
    assert conflict.any()
    assert not conflict.all()


@pytest.mark.parametrize("norms", ["fast", "loop"])
def test_float32_stays_within_the_bounds_of_the_conformance_suite(norms: Any) -> None:
    """Of both frameworks, about the exact result of the float64 contributions."""
    exact = by_torch("float64", "loop")
    blocks = exact["blocks"]
    rows = [
        np.stack([flat(tree, blocks) for tree in exact[f"{stream}_rows"]]) for stream in ("plasticity", "stability")
    ]
    case = Case(*rows, group_ids=np.arange(2).repeat(GROUP), sizes=blocks.sizes)
    single, contributions = Arithmetic("float32"), 2e-6  # the latter: what a float32 model is off by, in norm
    update, pairs, stats = oracle.resolve(case, RULE)
    allowed = update_bounds(case, RULE, single, "float32", inputs=contributions)
    pulled, _, jax_update, jax_report = by_jax("float32", norms)
    other = by_torch("float32", norms)
    for name, of_blocks, found in (
        ("jax", flat(jax_update, blocks), jax_report.statistics),
        ("torch", flat(other["update"], blocks), other["statistics"]),
    ):
        off = of_blocks - np.asarray([float(x) for x in update])
        for block, where, stat, error, bound in zip(
            range(4), case.blocks(), stats, errors(case, single, inputs=contributions), allowed, strict=True
        ):
            assert np.linalg.norm(off[where]) <= bound < 0.01 * np.linalg.norm(of_blocks[where]), (name, block)
            for ours, theirs in oracle.SUMS.items():
                gap = abs(float(getattr(found, ours)[block]) - float(getattr(stat, theirs)))
                assert gap <= getattr(error, theirs), (name, ours, block)
    assert any(pair.conflict for pair in pairs)
    for stream in ("plasticity", "stability"):
        assert_trees_close(getattr(pulled, stream), exact[stream], 1e-5)


def flat(tree: Any, blocks: Any) -> Any:
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.asarray(leaves[k], dtype="float64").reshape(-1) for k in blocks.leaves])
