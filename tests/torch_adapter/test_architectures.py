"""What "mlp" chooses in the architectures of transformers, by structure and not by their names."""

from __future__ import annotations

import re
from typing import Any

import pytest
import transformers
from architectures import names, on_no_device
from peft import LoraConfig, get_peft_model
from problems import tiny_model
from torch import nn

from pcr_torch import select_blocks
from pcr_torch.blocks import describe_blocks

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
    "RobertaPreLayerNorm": "dense", "AXK2": _BOTH, "Blt": _GATED, "Zamba": _GATED,
    "JetMoe": "input_linear output_linear", "XLMWithLMHeadModel": "lin1 lin2", "MusicgenForCausalLM": "fc1 fc2",
    "xLSTM": "proj_down proj_up proj_up_gate", "Zamba2": "down_proj gate_up_proj gate_up_proj_adapter_list",
    "T5ForConditionalGeneration": "wi wo", "BartForConditionalGeneration": "fc1 fc2",
    "XLNetLMHeadModel": "layer_1 layer_2", "WhisperForConditionalGeneration": "fc1 fc2",
    "Cohere2VisionForConditionalGeneration": _GATED, "Qwen2AudioForConditionalGeneration": _GATED,
    "Blip2ForConditionalGeneration": "fc1 fc2", "Qwen2_5OmniForConditionalGeneration": _GATED,
    "Pix2StructForConditionalGeneration": "wi_0 wi_1 wo", "VisionEncoderDecoderModel": "dense",
    "EvollaForProteinText2Text": "down_proj fc1 fc2 gate_proj up_proj",
    "SpeechT5ForSpeechToText": "intermediate_dense output_dense",
    "Phi4MultimodalForCausalLM": "down_proj gate_up_proj", "MllamaForConditionalGeneration": _GATED,
    "NllbMoeForConditionalGeneration": "fc1 fc2", "DeepseekV3ForCausalLM": _BOTH,
}  # fmt: skip


def architecture(name: str) -> str:
    return name if hasattr(transformers, name) else f"{name.removesuffix('Text')}ForCausalLM"


def below_layer(name: str, stack: str | None) -> str:
    return name.removeprefix(f"{stack}.").partition(".")[2]


def is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and sum(size > 1 for size in parameter.shape) > 1


def assert_is_mlp(model: nn.Module) -> None:
    """By what names and classes say, read otherwise than the selection does."""
    blocks = select_blocks(model)
    chosen = {name for block in blocks for name in block.parameters}
    for block in blocks:
        assert block.layer is not None
        assert block.stack is not None
        assert not _FOREIGN.search(block.stack), block.name
        for name in block.parameters:
            assert not _NOT_MLP.search(below_layer(name, block.stack)), name
            assert model.get_parameter(name).ndim > 1
    stacks = {block.stack for block in blocks}
    for path, module in model.named_modules():
        stack = next((s for s in stacks if path.startswith(f"{s}.")), None)
        if _MLP.search(type(module).__name__) and stack and not _NOT_MLP.search(below_layer(path, stack)):
            matrices = {id(p) for name, p in module.named_parameters() if is_matrix(p) and _OF_MLP.search(name)}
            assert matrices <= {id(model.get_parameter(name)) for name in chosen}, path
    no_text = model.main_input_name != "input_ids" or "Speech" in type(model).__name__
    foreign = re.compile(f"{_FOREIGN.pattern}|encoder") if no_text else _FOREIGN
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for path in lists:  # no stack is missed as a whole
        inside_of_one = any(path.startswith(f"{other}.") for other in lists)
        trained = any(is_matrix(p) for p in model.get_submodule(path).parameters())
        if path not in stacks and not foreign.search(path) and trained and not inside_of_one:
            inside = [type(module).__name__ for module in model.get_submodule(path).modules()]
            assert not [kind for kind in inside if _MLP.search(kind)], path


_FOREIGN = re.compile(
    r"vision|visual|image|audio|tower|speech_encoder|qformer|project|connector|protein|codec|wav|merger|talker|acoustic|semantic|timestamp|diffusion"
)
_NOT_MLP = re.compile(r"attn|attention|router|norm|embed|conv|bias|mamba|lstm|altup|laurel|^per_layer|vision|_hc")
_MLP = re.compile(r"(MLP|Mlp|FFN|FeedForward|Experts|ActDense|Intermediate)$")
_OF_MLP = re.compile(r"^(?!.*(bias|lora|router|gate\.|scale))")


@pytest.mark.parametrize("name", CHOSEN)
def test_mlp_of(name: str) -> None:
    model = on_no_device(architecture(name))
    assert " ".join(sorted({block.family for block in select_blocks(model)})) == CHOSEN[name]
    assert_is_mlp(model)


@pytest.mark.slow
def test_mlp_of_every_language_model_of_transformers() -> None:
    tried, wrong = 0, {}
    for name in names():
        try:
            model = on_no_device(name)
        except Exception:  # parts of other libraries, or a default configuration that fits nothing
            continue
        tried += 1
        try:
            assert_is_mlp(model)
        except (AssertionError, ValueError) as error:
            wrong[name] = str(error).splitlines()[0]
    without = {name for name, why in wrong.items() if "layers have no MLP" in why and "blocks=" in why}
    assert without == {"MambaForCausalLM", "Mamba2ForCausalLM", "FalconMambaForCausalLM", "PI0ForConditionalGeneration"}
    assert wrong.keys() == without, wrong
    assert tried > 0.9 * len(names())


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_a_model_without_an_mlp_names_its_matrices(name: str) -> None:
    with pytest.raises(ValueError, match=r"layers have no MLP") as refused:
        select_blocks(on_no_device(architecture(name)))
    assert re.search(r"blocks='\w+_proj\|\w+_proj'", str(refused.value))
    assert "nn.ModuleList" not in str(refused.value)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "SiglipVisionModel", "Dinov2Model", "Wav2Vec2ForCTC"])
def test_models_of_pictures_or_sound_alone_need_a_pattern(name: str) -> None:
    model = on_no_device(name)
    with pytest.raises(ValueError, match=r"not of the language model.*for example blocks="):
        select_blocks(model)
    assert select_blocks(model, r"(fc1|dense)\.weight")


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
    (tower,) = (line for line in table if "vision_tower" in line and "fc1.weight" in line)
    assert tower.endswith("left out: not of the language model")
