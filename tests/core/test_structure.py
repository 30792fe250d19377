"""What names, classes and shapes say of where a matrix lies."""

from __future__ import annotations

import pytest

from pcr_core._structure import UNCLEAR, Parameter, Part, left_out
from pcr_core._words import told_by_class, told_by_name, without_model_name, words


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SeedOssMLP", ("seed", "oss", "mlp")),
        ("NemotronHMLP", ("nemotron", "h", "mlp")),
        ("GPT2MLP", ("gpt", "2", "mlp")),
        ("Qwen3MoeExperts", ("qwen", "3", "moe", "expert")),
        ("post_attention_layernorm", ("post", "attention", "layernorm")),
        ("", ()),
    ],
)
def test_words(name: str, expected: tuple[str, ...]) -> None:
    assert words(name) == expected


@pytest.mark.parametrize(
    ("attribute", "kind"),
    [
        ("feed_forward", "mlp"), ("feed_forward1", "mlp"), ("ff1", "mlp"), ("mlps", "mlp"), ("DenseReluDense", "mlp"),
        ("SelfAttention", "attention"), ("linear_attn", "attention"), ("ln_1", "norm"), ("mlp_norm", "norm"),
        ("attention_mlp", "mlp"), ("rg_lru", "state space or recurrence"), ("short_conv", "convolution"),
        ("per_layer_input_gate", "side path of a layer"), ("hc_fn", "side path of a layer"), ("fc1", None),
    ],
)  # fmt: skip
def test_names(attribute: str, kind: str | None) -> None:
    assert told_by_name(attribute) == kind


@pytest.mark.parametrize(
    ("of_class", "kind"),
    [
        ("MultiHeadAttention", "attention"), ("ZambaAttentionDecoderLayer", None), ("Qwen2RMSNorm", "norm"),
        ("RobertaPreLayerNormOutput", None), ("RecurrentGemmaMlp", "mlp"), ("Conv1D", None), ("Conv1d", "convolution"),
        ("Qwen3NextGatedDeltaNet", "state space or recurrence"), ("GptOssTopKRouter", "router"), ("Linear", None),
    ],
)  # fmt: skip
def test_classes(of_class: str, kind: str | None) -> None:
    assert told_by_class(of_class) == kind


@pytest.mark.parametrize(
    ("name", "others", "rest"),
    [
        ("Cohere2VisionModel", ("Cohere2VisionForConditionalGeneration",), "Model"),
        ("JetMoeMoA", ("JetMoeModel",), "MoA"),
        ("LlamaMLP", ("LlamaModel", "ModuleList"), "MLP"),
        ("Linear", ("LlamaModel",), "Linear"),
        ("MLP", ("MLP",), "MLP"),
        ("Linear", (), "Linear"),
    ],
)
def test_a_models_name_tells_nothing_of_its_parts(name: str, others: tuple[str, ...], rest: str) -> None:
    assert without_model_name(name, others) == rest


def parameter(path: str, shape: tuple[int, ...] = (4, 8), **kinds: str) -> Parameter:
    """`layers.0.mlp.up.weight`; classes by attribute."""
    before, _, below = path.partition(".0.")
    parts = [[Part(key, kinds.get(key, "")) for key in half.split(".")] for half in (before, below)]
    return Parameter(tuple(parts[0]), Part("0"), tuple(parts[1][:-1]), parts[1][-1].attribute, shape)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("layers.0.mlp.up.weight", None),
        ("layers.0.fc1.weight", None),
        ("layers.0.norm.mlp.fc1.weight", "norm"),
        ("layers.0.self_attention.experts.w1", "attention"),
        ("layers.0.mlp.router.fc1.weight", "router"),
        ("layers.0.mlp.bias", "vector"),
        ("layers.0.mlp.up.weight_scale", "vector"),
        ("vision_tower.layers.0.mlp.up.weight", "not of the language model"),
        ("layers.0.mlp.up.lora_A.vision.weight", "not of the language model"),
        ("lm_heads.0.weight", "output head"),
        ("altup.layers.0.mlp.up.weight", "side path of a layer"),
        ("attentions.0.k_lin.weight", "attention"),
        ("layers.0.wq", "attention"),
        ("layers.0.mixer.in_proj.weight", "mixer"),
        ("layers.0.feed_forward.key.weight", None),
        ("layers.0.channel_mix.key.weight", None),
        ("layers.0.time_mix.output.weight", "state space or recurrence"),
        ("layers.0.att.output.weight", "attention"),
    ],
)
def test_reasons(path: str, reason: str | None) -> None:
    assert left_out([parameter(path)]) == [reason]


def test_a_layer_that_is_called_by_its_attention_may_hold_an_mlp() -> None:
    adapter = {"adapter": "AlignerCrossAttention"}
    assert left_out(
        [parameter("layers.0.adapter.ff.fc1", **adapter), parameter("layers.0.adapter.fc1", **adapter)]
    ) == [
        None,
        "attention",
    ]


def test_where_layers_name_their_mlp_nothing_else_is_one() -> None:
    named, bare, elsewhere = "layers.0.mlp.up.weight", "layers.0.linear.weight", "blocks.0.linear.weight"
    assert left_out([parameter(bare), parameter(named), parameter(elsewhere)]) == ["beside the MLPs", None, None]


def test_a_gate_of_the_shape_of_what_lies_beside_it_is_half_an_mlp() -> None:
    gate, up = parameter("layers.0.mlp.gate.weight"), parameter("layers.0.mlp.up.weight")
    router = parameter("layers.0.mlp.gate.weight", (4, 3))
    assert left_out([gate, up]) == [None, None]
    assert left_out([router, up]) == ["router", None]
    assert left_out([gate]) == ["router"]


@pytest.mark.parametrize(
    ("shapes", "clear"),
    [
        ([(8, 4), (4, 8)], True),
        ([(8, 4), (8, 4), (4, 8)], True),
        ([(8, 4), (4, 8), (8, 4), (4, 8)], False),  # attention may be wider than the residual stream
        ([(4, 4), (4, 4), (4, 4)], False),
        ([(12, 4), (4, 4)], False),
    ],
)
def test_numbered_matrices_are_an_mlp_by_their_shapes(shapes: list[tuple[int, ...]], clear: bool) -> None:
    expected = None if clear else UNCLEAR
    numbered = [parameter(f"layers.0.Dense_{i}.kernel", shape) for i, shape in enumerate(shapes)]
    assert left_out(numbered) == [expected] * len(shapes)
    named = [parameter(f"layers.0.{letter}.kernel", shape) for letter, shape in zip("abcd", shapes)]
    assert left_out(named) == [None] * len(shapes)
