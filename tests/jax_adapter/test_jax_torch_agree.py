"""One transformer in two frameworks: the same weights and batch give the same decision and update."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import tiny
from tiny import BETA, GROUP, PROMPT, assert_statistics_close, relative

import pcr_core
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


def as_tree(model: Any) -> Any:
    """`.grad` as the JAX parameters are laid out."""
    return {
        "embed": model.embed.grad.numpy(),
        "layers": [
            {
                part: {name: m.weight.grad.numpy().T for name, m in getattr(layer, part).items()}
                for part in ("attn", "mlp")
            }
            for layer in model.layers
        ],
        "head": model.head.weight.grad.numpy().T,
    }


@pytest.mark.parametrize("norms", ["fast", "loop"])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-4)])
def test_losses_cotangents_statistics_alpha_and_update(dtype: str, bound: float, norms: Any) -> None:
    from pcr_torch import PCR

    weights, batch = tiny.parameters(dtype=dtype), tiny.rollouts(dtype=dtype)
    rule = pcr_core.PCR(alpha="snr", gate="probability")
    options: dict[str, Any] = {"beta": BETA, "normalization": "dapo", "normalizer": tiny.tokens_in(batch)}

    model = Model(weights)
    method = PCR(model, rule=rule, norms=norms)
    rows = {name: torch.from_numpy(np.array(x)) for name, x in batch.items()}
    logp = model(rows["tokens"].long())
    lost = pcr_core.grpo_objective(
        logp.detach(), rows["logp_old"], rows["logp_ref"], rows["advantages"], rows["mask"], **options
    )
    method.accumulate(logp, lost, group_ids=torch.arange(2).repeat_interleave(GROUP))
    reference = method.resolve()
    method.remove()

    with jax.enable_x64(dtype == "float64"):
        params, data = tiny.on_device(weights), tiny.on_device(batch)
        blocks = select_blocks(params)
        of_rows = tiny.objective(tiny.tokens_in(batch))
        pulled = jax.jit(
            lambda params, data: pullback(
                tiny.forward, params, data, of_rows, blocks=blocks, group_size=GROUP, norms=norms
            )
        )(params, data)
        update, report = resolve(pulled.plasticity, pulled.stability, pulled.scatter(), rule, blocks=blocks)
        objective = of_rows(pulled.logp, data)

    for name in ("plasticity_loss", "stability_loss", "plasticity_cotangent", "stability_cotangent"):
        assert relative(getattr(objective, name), getattr(lost, name).numpy()) <= bound, name
    order = [
        [block.parameters[0] for block in reference.blocks].index(f"{b.replace('/', '.')}.weight") for b in blocks.names
    ]
    expected = pcr_core.BlockStatistics(
        *(getattr(reference.statistics, name).numpy()[order] for name in pcr_core.BlockStatistics.__dataclass_fields__)
    )
    assert_statistics_close(report.statistics, expected, 10 * bound)
    np.testing.assert_allclose(report.weights.alpha, reference.weights.alpha.numpy()[order], rtol=10 * bound)
    grads = as_tree(model)
    for got, want in zip(jax.tree.leaves(update), jax.tree.leaves(grads), strict=True):
        assert relative(got, want) <= 10 * bound
    assert np.isfinite(pulled.logp).all()
