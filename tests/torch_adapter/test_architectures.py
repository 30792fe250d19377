"""What "mlp" chooses in the architectures of transformers, by structure and not by their names."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from problems import tiny_model
from torch import nn

from pcr_torch import select_blocks
from pcr_torch.blocks import describe_blocks

_SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_GATED = "down_proj gate_proj up_proj"
_EXPERTS = "down_proj gate_up_proj"
_BOTH = "down_proj gate_proj gate_up_proj up_proj"
CHOSEN = {
    "Llama": _GATED, "Qwen2": _GATED, "Qwen3": _GATED, "Mistral": _GATED, "Gemma": _GATED, "Gemma2": _GATED,
    "Gemma4Text": _GATED, "Olmo2": _GATED, "Cohere": _GATED, "StableLm": _GATED, "SeedOss": _GATED, "Exaone4": _GATED,
    "Helium": _GATED, "FalconH1": _GATED, "RecurrentGemma": _GATED, "Bamba": _GATED, "Starcoder2": "c_fc c_proj",
    "Phi": "fc1 fc2", "OPT": "fc1 fc2", "GPTJ": "fc_in fc_out", "Mpt": "down_proj up_proj", "Lfm2": "w1 w2 w3",
    "GPTNeoX": "dense_4h_to_h dense_h_to_4h", "Falcon": "dense_4h_to_h dense_h_to_4h",
    "Bloom": "dense_4h_to_h dense_h_to_4h", "Rwkv": "key receptance value", "Mixtral": _EXPERTS, "Qwen3Moe": _EXPERTS,
    "GptOss": _EXPERTS, "GraniteMoe": _EXPERTS, "Olmoe": _EXPERTS, "MiniMax": _EXPERTS, "Qwen2Moe": _BOTH,
    "Glm4Moe": _BOTH, "Llama4Text": _BOTH, "Qwen3Next": _BOTH, "Jamba": _BOTH, "Ernie4_5_Moe": _BOTH,
    "NemotronH": "down_proj up_proj", "GraniteMoeHybrid": "down_proj gate_up_proj input_linear output_linear",
}  # fmt: skip


def on_no_device(name: str) -> nn.Module:
    """A model of two layers without memory for its weights."""
    config = getattr(transformers, f"{name}Config")
    try:
        made = config(**_SMALL)
    except Exception:  # some check that sizes fit those that are not given
        made = config(vocab_size=31)
    for option in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(made, option, None):
            setattr(made, option, 4)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    with torch.device("meta"):
        return model(made)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CHOSEN)
def test_mlp_of(name: str) -> None:
    model = on_no_device(name)
    blocks = select_blocks(model)
    assert " ".join(sorted({block.family for block in blocks})) == CHOSEN[name]
    chosen = [parameter for block in blocks for parameter in block.parameters]
    assert not [n for n in chosen if re.search(r"attn|attention|router|norm|embed|conv|bias|mamba", n)]
    assert all(block.layer is not None for block in blocks)


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_a_model_without_an_mlp_names_its_matrices(name: str) -> None:
    with pytest.raises(ValueError, match=r"layers have no MLP") as refused:
        select_blocks(on_no_device(name))
    assert re.search(r"blocks='\w+_proj\|\w+_proj'", str(refused.value))
    assert "nn.ModuleList" not in str(refused.value)


def test_lora_on_attention_alone_names_the_adapters() -> None:
    model: Any = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"LoRA adapters lie outside the MLPs.*blocks='lora_'"):
        select_blocks(model)
    assert len(select_blocks(model, "lora_")) == 8


def test_towers_are_left_out_and_the_table_says_why() -> None:
    from test_owners import llava

    model = llava()
    assert all("language_model" in block.name for block in select_blocks(model))
    stacks = {block.stack for block in select_blocks(model, r"mlp.*weight")}
    assert stacks == {"model.language_model.layers", "model.vision_tower.encoder.layers"}
    table = describe_blocks(model).splitlines()
    assert [line.split()[1:] for line in table if "language_model" in line and "up_proj" in line] == [
        ["2", "24x16", "chosen"]
    ]
    (tower,) = (line for line in table if "vision_tower" in line and "fc1" in line)
    assert tower.endswith("left out: not of the language model")
