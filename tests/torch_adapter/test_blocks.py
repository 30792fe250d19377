"""Block selection by structure, on the architectures people train."""

from __future__ import annotations

import pytest
from problems import tiny_model
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from pcr_torch import select_blocks

SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def families(model: nn.Module, blocks: str = "mlp") -> set[str]:
    return {block.family for block in select_blocks(model, blocks)}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_mlp_is_the_three_projections_of_gated_models(architecture: str) -> None:
    blocks = select_blocks(tiny_model(architecture))
    assert [block.family for block in blocks] == ["gate_proj", "up_proj", "down_proj"] * 2
    assert [block.layer for block in blocks] == [0, 0, 0, 1, 1, 1]
    assert blocks[0].parameters == ("model.layers.0.mlp.gate_proj.weight",)


def test_mlp_of_gpt2_has_matrices_but_no_biases_and_no_attention() -> None:
    names = [block.name for block in select_blocks(tiny_model("gpt2"))]
    assert names == [f"transformer.h.{i}.mlp.{m}.weight" for i in (0, 1) for m in ("c_fc", "c_proj")]


def test_mlp_of_mistral_and_opt() -> None:
    assert families(MistralForCausalLM(MistralConfig(**SMALL))) == {"gate_proj", "up_proj", "down_proj"}
    config = OPTConfig(vocab_size=31, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2)
    config.word_embed_proj_dim = 16
    assert families(OPTForCausalLM(config)) == {"fc1", "fc2"}  # they lie in the layer itself, beside attention


def test_mlp_of_a_mixture_of_experts_leaves_the_router_out() -> None:
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))
    names = [name for block in select_blocks(model) for name in block.parameters]
    assert names
    assert all("experts" in name for name in names)


def test_lora_blocks_are_the_adapters_inside_mlp_modules() -> None:
    blocks = select_blocks(tiny_model("llama", lora=True))
    assert {block.family for block in blocks} == {f"{m}_proj.lora_{x}" for m in ("gate", "down") for x in "AB"}
    assert len(blocks) == 8  # q_proj has an adapter too, but is attention


@pytest.mark.parametrize(
    ("granularity", "names"),
    [
        ("module", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("layer", ["model.layers.0", "model.layers.1"]),
        ("global", ["global"]),
    ],
)
def test_granularity(granularity: str, names: list[str]) -> None:
    blocks = select_blocks(tiny_model("llama"), "mlp", granularity)  # type: ignore[arg-type]
    assert [block.name for block in blocks] == names
    assert sum(len(block.parameters) for block in blocks) == 6
    assert blocks[0].layer == (None if granularity == "global" else 0)


def test_all_takes_every_trainable_parameter_once() -> None:
    model = tiny_model("qwen2")  # tied embeddings
    model.get_parameter("model.norm.weight").requires_grad_(False)
    names = [name for block in select_blocks(model, "all") for name in block.parameters]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_regular_expression_and_callable() -> None:
    model = tiny_model("llama")
    assert [b.name for b in select_blocks(model, r"layers\.1\..*down_proj")] == ["model.layers.1.mlp.down_proj.weight"]
    by_kind = select_blocks(model, lambda name, p: "up" if "up_proj" in name else None)
    assert [(b.name, b.layer, len(b.parameters)) for b in by_kind] == [("up", None, 2)]


def test_nothing_matched_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"blocks: 'ffn' matches no trainable parameter.*model\.embed_tokens\.weight"):
        select_blocks(tiny_model("llama"), "ffn")
    with pytest.raises(ValueError, match=r"nn\.ModuleList"):
        select_blocks(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="not a regular expression"):
        select_blocks(tiny_model("llama"), "(")
    with pytest.raises(TypeError, match="blocks"):
        select_blocks(tiny_model("llama"), 3)  # type: ignore[arg-type]


def test_everything_frozen_says_so() -> None:
    model = tiny_model("llama")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="is frozen"):
        select_blocks(model)


def test_a_single_layer_is_a_block() -> None:
    assert [block.family for block in select_blocks(nn.Linear(4, 5), "all", "tensor")] == ["weight", "bias"]
