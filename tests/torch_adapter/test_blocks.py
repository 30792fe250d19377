"""Block selection by structure, on the architectures people train."""

from __future__ import annotations

import re

import pytest
from problems import tiny_model
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from pcr_torch import describe_blocks, select_blocks

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


class Named(nn.Module):
    """Linear layers, by their names and the shapes of their weights."""

    def __init__(self, **shapes: tuple[int, int] | nn.Module) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, shape if isinstance(shape, nn.Module) else nn.Linear(*reversed(shape)))


def test_mlp_of_models_written_with_the_names_of_jax() -> None:
    mlp, attention = (
        Named(wi_0=(8, 4), wi_1=(8, 4), wo=(4, 8)),
        Named(query=(4, 4), key=(4, 4), value=(4, 4), out=(4, 4)),
    )
    assert families(nn.ModuleList([Named(mlp=mlp, self_attention=attention)])) == {"wi_0", "wi_1", "wo"}
    bare = Named(wq=(4, 4), wk=(4, 4), wv=(4, 4), wo=(4, 4), wi=(8, 4))
    assert families(nn.ModuleList([bare])) == {"wi"}


@pytest.mark.parametrize("parts", [("att", "ffn"), ("time_mix", "channel_mix"), ("tmix", "cmix")])
def test_mlp_of_rwkv_is_its_channel_mixing(parts: tuple[str, str]) -> None:
    class RWKV_Tmix_x070(Named): ...

    class RWKV_CMix_x070(Named): ...

    time = RWKV_Tmix_x070(receptance=(4, 4), key=(4, 4), value=(4, 4), output=(4, 4))
    channel = RWKV_CMix_x070(receptance=(4, 4), key=(8, 4), value=(4, 8))
    names = [block.name for block in select_blocks(nn.ModuleList([Named(**dict(zip(parts, (time, channel))))]))]
    assert names == [f"0.{parts[1]}.{name}.weight" for name in ("receptance", "key", "value")]


def test_a_gated_mlps_gate_is_no_router() -> None:
    gated, experts = Named(gate=(8, 4), up=(8, 4), down=(4, 8)), Named(gate=(3, 4), up=(8, 4), down=(4, 8))
    names = [block.name for block in select_blocks(nn.ModuleList([Named(mlp=gated), Named(mlp=experts)]))]
    assert [name for name in names if "gate" in name] == ["0.mlp.gate.weight"]
    assert len(names) == 5


def test_attention_among_numbered_matrices_is_not_taken_for_an_mlp() -> None:
    def mlp() -> list[nn.Module]:
        return [nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)]

    model = nn.ModuleList([nn.Sequential(nn.Linear(4, 12), nn.Linear(4, 4), *mlp()) for _ in range(2)])
    with pytest.raises(
        ValueError, match=r"cannot tell attention from an MLP .*\(2 layers\).*2.weight \(16x4\)"
    ) as refused:
        select_blocks(model)
    assert describe_blocks(model).count("its name does not tell") == 8
    example = re.search(r"for example blocks=r'(.*)'", str(refused.value))
    assert example
    assert [b.name for b in select_blocks(model, example[1])] == [f"{i}.{j}.weight" for i in (0, 1) for j in (2, 4)]
    model.requires_grad_(False)
    model.append(nn.Sequential(*mlp()))
    assert len(select_blocks(model)) == 2  # what is frozen is in no block, whatever it is
    assert len(select_blocks(nn.ModuleList([nn.Sequential(*mlp())]))) == 2


def test_the_table_shows_all_parameters_also_where_nothing_is_chosen() -> None:
    model = nn.ModuleList([Named(mlp=Named(router=(3, 4), up=(8, 4), down=(4, 8)))])
    model.get_parameter("0.mlp.down.weight").requires_grad_(False)
    assert [" ".join(line.split()) for line in describe_blocks(model).splitlines()[1:]] == [
        "0.mlp.router.weight 1 3x4 left out: router",
        "0.mlp.router.bias 1 3 left out: vector",
        "0.mlp.up.weight 1 8x4 chosen",
        "0.mlp.up.bias 1 8 left out: vector",
        "0.mlp.down.weight 1 4x8 left out: frozen",
        "0.mlp.down.bias 1 4 left out: vector",
    ]
    assert describe_blocks(model, lambda name, parameter: False).count("left out: the callable leaves it out") == 6
    assert "left out: outside the layers" in describe_blocks(nn.Linear(2, 2))
