"""Functions that overwrite what they saved, as some fused kernels do, are found in the first microbatch."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from problems import batch, tiny_model
from steps import gradients
from torch import Tensor, nn

import pcr_core
from pcr_torch import PCR
from pcr_torch.overwritten import _python_nodes


class Doubled(torch.autograd.Function):
    """SwiGLU's product, whose backward pass writes over `where`, unnoticed by autograd."""

    where = "nothing"

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        product = nn.functional.silu(gate) * up
        ctx.save_for_backward(gate, up, product)
        ctx.gate, ctx.parts = gate.detach().clone(), [up.detach().clone()]
        return product

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        gate, up, _ = ctx.saved_tensors
        if Doubled.where == "attribute":
            gate = ctx.gate
        elif Doubled.where == "list":
            up = ctx.parts[0]
        s = gate.sigmoid()
        of_gate, of_up = dy * up * s * (1 + gate * (1 - s)), dy * gate * s
        if Doubled.where in ("saved", "attribute"):
            gate.data.copy_(of_gate)
        elif Doubled.where == "list":
            up.data.copy_(of_up)
        elif Doubled.where == "incoming":
            dy.data.copy_(of_gate)
            of_gate = dy
        return of_gate, of_up


class Fused(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(Doubled.apply(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-untyped-call]


def model_of(*, fused: bool, checkpointing: bool = False) -> Any:
    model: Any = tiny_model("llama")
    if fused:
        for layer in model.model.layers:
            layer.mlp = Fused(layer.mlp)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


TIERS: dict[str, dict[str, Any]] = {
    "without noise": {"noise_every": 0},
    "by probes": {"noise_every": 1, "norms": "fast"},
    "by the loop": {"noise_every": 1, "norms": "loop"},
}


def update(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    data = batch()
    method = PCR(model, rule=pcr_core.PCR(alpha=0.7), **options)
    for _ in range(2):
        logp = data.logp(model)
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
    method.resolve()
    method.remove()
    return gradients(model)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("where", ["saved", "attribute", "list"])
def test_a_function_that_overwrites_what_it_saved_is_named(
    where: str, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Doubled, "where", where)
    with pytest.raises(ValueError, match=r"test_overwritten\.Doubled overwrites the tensors that it saved"):
        update(model_of(fused=True), **TIERS[tier])


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    ("where", "checkpointing"), [("nothing", False), ("incoming", False), ("saved", True), ("incoming", True)]
)
def test_functions_that_do_not_are_right(
    where: str, checkpointing: bool, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What checkpointing recomputes may be overwritten, and the incoming gradient, which nobody else reads."""
    monkeypatch.setattr(Doubled, "where", where)
    expected = update(model_of(fused=False), **TIERS[tier])
    for name, gradient in update(model_of(fused=True, checkpointing=checkpointing), **TIERS[tier]).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_below_the_blocks_one_pass_may_overwrite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doubled, "where", "saved")
    models: list[Any] = [tiny_model("llama") for _ in range(2)]
    models[1].model.layers[0].mlp = Fused(models[1].model.layers[0].mlp)
    expected, got = (update(model, blocks=r"layers\.1\.mlp", noise_every=0) for model in models)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_the_graph_is_not_kept_alive() -> None:
    model, data = model_of(fused=True), batch()
    method = PCR(model, noise_every=0)
    logp = data.logp(model)
    graph = weakref.ref(next(_python_nodes(logp.grad_fn)))
    method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
    gc.disable()
    try:
        del logp
        assert graph() is None
    finally:
        gc.enable()
