"""LoRA over quantised base weights, which are int8 with scales here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as stock
from peft import LoraConfig, get_peft_model
from problems import tiny_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl_runs import relative_error, train

from pcr_torch import PCR
from pcr_torch.trl import PCRConfig, PCRTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Int8Linear(nn.Linear):
    """A weight of int8 with a scale for each row, dequantised in the forward pass, as bitsandbytes does."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        weight = plain.weight.detach()
        self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True) / 127)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def dequantised(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dequantised().to(x.dtype))


def quantise(model: Any, *, again: bool) -> Any:
    """The layers' matrices as int8, or (`again`) as the ordinary numbers that these stand for."""
    for layer in model.model.layers:
        for parent in (layer.mlp, layer.self_attn):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    quantised = Int8Linear(child)
                    if again:
                        child.weight.data = quantised.dequantised()
                    else:
                        setattr(parent, name, quantised)
    if not again:
        model.is_quantized, model.hf_quantizer = True, SimpleNamespace(is_trainable=True)
    return model


class Models:
    def __init__(self, *, again: bool) -> None:
        self.again = again

    def from_pretrained(self, folder: Path) -> Any:
        return quantise(LlamaForCausalLM.from_pretrained(folder), again=self.again)


@pytest.mark.parametrize("options", [{"rule": "grpo"}, {"rule": "paper"}, {"rule": "paper", "norms": "loop"}])
def test_adapters_are_trained_as_over_the_dequantised_weights(
    options: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)
    lora = LoraConfig(r=2, target_modules=["up_proj", "down_proj", "q_proj"])
    settings: dict[str, Any] = {"peft_config": lora, "optim": "sgd", "learning_rate": 2.0, "max_grad_norm": 0.0}

    def gradients(cls: Any, config: Any, *, again: bool, **given: Any) -> tuple[Any, Any]:
        monkeypatch.setattr("trl_runs.LlamaForCausalLM", Models(again=again))
        trainer, found = train(cls, config, folder, tmp_path, **settings, **given)
        return trainer, found.steps

    trainer, got = gradients(PCRTrainer, PCRConfig, again=False, **options)
    assert (
        trainer.model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight").dtype == torch.int8
    )
    assert {b.family for b in trainer.last_report.blocks} == {
        f"{kind}_proj.lora_{part}" for kind in ("up", "down") for part in "AB"
    }
    assert trainer.last_report.metrics()["pcr/stability_norm"] > 0
    _, expected = gradients(PCRTrainer, PCRConfig, again=True, **options)
    if options == {"rule": "grpo"}:
        _, theirs = gradients(GRPOTrainer, GRPOConfig, again=False)
        assert relative_error(got[0], theirs[0]) <= 1e-6
        assert relative_error(got[1], theirs[1]) <= 1e-5
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) <= 1e-5


class Quantised(Tensor):
    """As torchao's: floating numbers to look at, whose operations are its own."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)  # type: ignore[attr-defined]

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values)
        raise NotImplementedError(function)


def test_quantised_blocks_are_refused_by_name() -> None:
    model: Any = tiny_model("llama")
    layer = model.model.layers[1].mlp
    layer.up_proj.weight = nn.Parameter(Quantised(layer.up_proj.weight.detach()))
    with pytest.raises(
        ValueError, match=r"blocks: model\.layers\.1\.mlp\.up_proj\.weight is quantised \(a Quantised\)"
    ):
        PCR(model)
    layer.up_proj.weight.requires_grad_(False)
    PCR(model).remove()
    frozen = get_peft_model(quantise(tiny_model("llama"), again=False), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.up_proj\.weight, which .* is quantised and cannot be trained"
    ):
        PCR(frozen, blocks=r"up_proj")
