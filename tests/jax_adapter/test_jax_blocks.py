"""Block selection by path, on the namings people use."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import linen, nnx

from pcr_jax import Blocks, describe_blocks, select_blocks


def matrix(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape or (4, 4), jnp.float32)


def test_pure_jax_model() -> None:
    blocks = select_blocks(tiny.parameters(layers=2))
    assert blocks.names == ("layers/0/mlp/down", "layers/0/mlp/up", "layers/1/mlp/down", "layers/1/mlp/up")
    assert blocks.layers == (0, 0, 1, 1)
    assert blocks.sizes == (96,) * 4
    assert [blocks.paths[k] for k in blocks.leaves] == list(blocks.names)


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=4, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(9, 4, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 9, rngs=rngs)


def test_nnx_state() -> None:
    state = nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)
    expected = ("layers/0/down/kernel", "layers/0/up/kernel", "layers/1/down/kernel", "layers/1/up/kernel")
    assert select_blocks(state).names == expected
    assert select_blocks(nnx.to_pure_dict(state)).names == expected


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = x + linen.MultiHeadDotProductAttention(num_heads=2)(x)
        return x + linen.Dense(4)(linen.Dense(8)(linen.LayerNorm()(x)))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, tokens: Any) -> Any:
        x = linen.Embed(9, 4)(tokens)
        for _ in range(2):
            x = LinenBlock()(x)
        return linen.Dense(9)(x)


def test_linen_variables() -> None:
    variables = jax.eval_shape(LinenModel().init, jax.random.key(0), jnp.zeros((2, 3), jnp.int32))
    blocks = select_blocks(variables)
    assert blocks.names == tuple(f"params/LinenBlock_{i}/Dense_{j}/kernel" for i in (0, 1) for j in (0, 1))
    assert blocks.layers == (0, 0, 1, 1)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("granularity", ["tensor", "layer", "global"])
def test_a_stack_of_layers_has_the_blocks_of_a_list(axis: int, granularity: Any) -> None:
    layer = {
        "attn": {"wq": matrix(4, 4)},
        "mlp": {"up": {"kernel": matrix(4, 8), "bias": matrix(8)}, "down": {"kernel": matrix(8, 4)}},
        "ln_1": {"scale": matrix(4)},
    }
    stack = jax.tree.map(lambda x: matrix(*x.shape[:axis], 3, *x.shape[axis:]), layer)
    embed = {"embed": matrix(9, 4)}
    for blocks in ("mlp", "all"):
        one, other = (select_blocks({"layers": x, **embed}, blocks, granularity) for x in ([layer] * 3, stack))
        assert (one.names, one.layers, one.sizes, one.stacks) == (other.names, other.layers, other.sizes, other.stacks)
    if granularity == "tensor":
        assert select_blocks({"layers": stack}, "up/kernel").of_leaf[-1] == (0, 1, 2)


def test_stacks_of_several_kinds_of_layers() -> None:
    mlp = {"mlp": {"wi": matrix(4, 3, 8), "wo": matrix(8, 3, 4)}}
    blocks = select_blocks({"decoder": {"dense_layers": mlp, "moe_layers": mlp}})
    assert blocks.names[:2] == ("decoder/dense_layers/0/mlp/wi", "decoder/dense_layers/0/mlp/wo")
    assert len(blocks.names) == 12


def test_stacks_whose_axis_cannot_be_told_are_one_block() -> None:
    blocks = select_blocks({"layers": {"mlp": {"up": matrix(3, 4, 8), "down": matrix(5, 6, 4)}}}, "all")
    assert blocks.names == ("layers/mlp/down", "layers/mlp/up")
    assert blocks.stack_axes == (None, None)


def test_what_of_a_stack_is_chosen() -> None:
    stack = {
        "attn": {"wq": matrix(3, 4, 4)},
        "mlp": {"up": {"kernel": matrix(3, 4, 8), "bias": matrix(3, 8)}},
        "ln_1": {"scale": matrix(3, 4)},
    }
    blocks = select_blocks({"layers": stack, "embed": matrix()})
    assert blocks.names == ("layers/0/mlp/up/kernel", "layers/1/mlp/up/kernel", "layers/2/mlp/up/kernel")
    assert blocks.layers == (0, 1, 2)


def test_bare_attention_matrices_and_routers_are_left_out() -> None:
    layer = {name: matrix() for name in ("wq", "wk", "wv", "wo", "router", "w1", "w2", "gate_proj")}
    assert select_blocks([layer]).names == ("0/gate_proj", "0/w1", "0/w2")


def test_a_module_named_mlp_needs_no_layers() -> None:
    assert select_blocks({"mlp": {"kernel": matrix()}, "head": {"kernel": matrix()}}).names == ("mlp/kernel",)


@pytest.mark.parametrize(("granularity", "names"), [("layer", ("layers/0", "layers/1")), ("global", ("global",))])
def test_granularity(granularity: Any, names: tuple[str, ...]) -> None:
    blocks = select_blocks(tiny.parameters(layers=2), "mlp", granularity)
    assert blocks.names == names
    assert sum(blocks.sizes) == 4 * 96
    assert blocks.layers[0] == (None if granularity == "global" else 0)


def test_all_regular_expression_and_callable() -> None:
    params = {**tiny.parameters(layers=2), "step": jnp.zeros((), jnp.int32)}
    assert len(select_blocks(params, "all").leaves) == 10  # but not the counter
    assert select_blocks(params, r"1/mlp/d").names == ("layers/1/mlp/down",)
    by_kind = select_blocks(params, lambda path, leaf: "up" if path.endswith("up") else None)
    assert (by_kind.names, by_kind.layers, by_kind.sizes) == (("up",), (None,), (192,))
    assert select_blocks(params, lambda path, leaf: "head" in path).names == ("head",)


LAYOUTS: dict[str, tuple[str, str]] = {  # paths of matrices: those of an MLP, and the others
    "flax Llama": ("model/layers/0/mlp/gate_proj/kernel", "model/layers/0/self_attn/o_proj/kernel"),
    "flax GPT-2": ("transformer/h/0/mlp/c_fc/kernel", "transformer/h/0/attn/c_proj/kernel transformer/wte/embedding"),
    "flax BERT": (
        "bert/encoder/layer/0/intermediate/dense/kernel bert/encoder/layer/0/output/dense/kernel",
        "bert/encoder/layer/0/attention/output/dense/kernel bert/pooler/dense/kernel",
    ),
    "flax T5": (
        "encoder/block/0/layer/1/DenseReluDense/wi/kernel decoder/block/0/layer/2/DenseReluDense/wo/kernel",
        "encoder/block/0/layer/0/SelfAttention/o/kernel decoder/block/0/layer/1/EncDecAttention/k/kernel",
    ),
    "linen with names of its own": (
        "params/TransformerBlock_0/MlpBlock_0/Dense_0/kernel params/TransformerBlock_10/MlpBlock_0/Dense_1/kernel",
        "params/TransformerBlock_0/MultiHeadDotProductAttention_0/query/kernel params/Embed_0/embedding",
    ),
    "gemma": (
        "transformer/layer_0/mlp/gating_einsum transformer/layer_0/mlp/linear",
        "transformer/layer_0/attn/q_einsum/w transformer/embedder/input_embedding",
    ),
    "paligemma": (
        "params/llm/layers_0/mlp/linear",
        "params/img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel params/img/head/kernel",
    ),
    "haiku": (
        "transformer/h0_mlp/linear/w transformer/h11_mlp/linear_1/w",
        "transformer/h0_attn/query/w transformer/h0_attn/linear/w transformer/linear/w",
    ),
    "equinox": ("blocks/0/mlp/layers/0/weight", "blocks/0/attention/query_proj/weight embed/weight"),
    "t5x": (
        "decoder/layers_0/mlp/wi_0/kernel decoder/layers_0/mlp/wi_1/kernel decoder/layers_0/mlp/wo/kernel",
        "decoder/layers_0/self_attention/out/kernel decoder/layers_0/encoder_decoder_attention/value/kernel",
    ),
    "MaxText": (
        "decoder/layers_0/mlp/wi_0/kernel decoder/layers_0/mlp/wi_1/kernel decoder/layers_0/mlp/wo/kernel",
        "decoder/layers_0/self_attention/query/kernel decoder/layers_0/self_attention/out/kernel "
        "token_embedder/embedding decoder/logits_dense/kernel",
    ),
    "MaxText with experts": (
        "params/decoder/layers_0/MoeBlock_0/wi_0 params/decoder/layers_0/MoeBlock_0/wo",
        "params/decoder/layers_0/MoeBlock_0/gate/kernel params/decoder/layers_0/self_attention/out/kernel",
    ),
    "RWKV": (
        "blocks/0/ffn/key/weight blocks/0/ffn/receptance/weight blocks/0/ffn/value/weight",
        "blocks/0/att/key/weight blocks/0/att/value/weight blocks/0/att/output/weight emb/weight head/weight",
    ),
    "RWKV by its mixing": (
        "layers/0/channel_mixing/key layers/0/channel_mixing/value layers/1/ChannelMix/key layers/2/RWKV_CMix_x070/key",
        "layers/0/time_mixing/key layers/0/time_mixing/output layers/1/TimeMix/output layers/2/RWKV_Tmix_x070/output",
    ),
    "mixture of experts": (
        "layers/0/moe/experts/up layers/0/moe/shared_expert/down/kernel",
        "layers/0/moe/gate/kernel layers/0/moe/router/kernel layers/0/moe/shared_expert_gate/kernel",
    ),
    "hybrid": ("layers/0/ffn/w1", "layers/0/mixer/in_proj layers/0/mamba/x_proj layers/0/short_conv/kernel"),
    "hyper-connections": ("layers/0/ffn/w1", "layers/0/hc_fn layers/0/per_layer_gate/kernel layers/0/norm/mlp/w1"),
    "SeedOss": ("layers/0/SeedOssMLP/up", "layers/0/linear"),  # no ssm; what lies beside an MLP is none
    "no layers": ("decoder/mlp/wi/kernel", "decoder/head/kernel"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rules_of_torch_hold_for_paths(layout: str) -> None:
    mlp, others = (text.split() for text in LAYOUTS[layout])
    tree: dict[str, Any] = {}
    for k, path in enumerate((*mlp, *others)):
        *parents, leaf = path.split("/")
        inner = tree
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[leaf] = matrix(4, 5 + k)
    assert sorted(select_blocks(tree).names) == sorted(mlp)
    table = describe_blocks(tree)
    assert table.count("chosen") == len(mlp)
    assert table.count("left out: ") == len(others)


def test_a_gated_mlps_gate_is_no_router() -> None:
    gated = {"gate": matrix(4, 8), "up": matrix(4, 8), "down": matrix(8, 4)}
    experts = {"gate": matrix(4, 3), "up": matrix(3, 4, 8), "down": matrix(3, 8, 4)}
    names = select_blocks({"layers": [{"mlp": gated}, {"mlp": experts}]}).names
    assert [name for name in names if "gate" in name] == ["layers/0/mlp/gate"]
    assert len(names) == 5


def test_the_gates_of_lora_are_those_of_their_matrices() -> None:
    def adapted(rows: int, columns: int) -> Any:
        return {"kernel": matrix(rows, columns), "lora_a": matrix(rows, 2), "lora_b": matrix(2, columns)}

    gated = {"gate": adapted(4, 8), "up": adapted(4, 8), "down": adapted(8, 4)}
    experts = {"gate": adapted(4, 3), "up": adapted(4, 8), "down": adapted(8, 4)}
    names = select_blocks({"layers": [{"mlp": gated}, {"mlp": experts}]}).names
    assert [name for name in names if "gate" in name] == [
        f"layers/0/mlp/gate/{x}" for x in ("kernel", "lora_a", "lora_b")
    ]
    assert len(names) == 15


def dense(**shapes: tuple[int, ...]) -> Any:
    return {name: {"kernel": matrix(*shape)} for name, shape in shapes.items()}


UNNAMED: dict[str, Any] = {
    "query, key, value, out": dense(Dense_0=(4, 4), Dense_1=(4, 4), Dense_2=(4, 4), Dense_3=(4, 4)),
    "one matrix for query, key and value": dense(Dense_0=(4, 12), Dense_1=(4, 4)),
    "a dimension for heads": dense(DenseGeneral_0=(4, 3, 2, 2), DenseGeneral_1=(2, 2, 4)),
    "a module whose name says nothing": {"Mixing_0": dense(Dense_0=(4, 12), Dense_1=(4, 4))},
    "of which its parts alone tell": {**dense(Dense_0=(4, 4)), "SelfAttention_0": dense(query=(4, 4), value=(4, 4))},
}


@pytest.mark.parametrize("attention", UNNAMED)
def test_attention_among_numbered_matrices_is_not_taken_for_an_mlp(attention: str) -> None:
    mlp = dense(Dense_8=(4, 16), Dense_9=(16, 4))
    params = {"params": {f"Block_{i}": {**UNNAMED[attention], **mlp} for i in range(2)}}
    with pytest.raises(
        ValueError, match=r"cannot tell attention from an MLP .*\(2 layers\).*Dense_8/kernel \(4x16\)"
    ) as no:
        select_blocks(params)
    assert describe_blocks(params).count("its name does not tell") >= 3
    example = re.search(r"for example blocks=r'(.*)'", str(no.value))
    assert example
    assert select_blocks(params, example[1]).names == tuple(
        f"params/Block_{i}/Dense_{j}/kernel" for i in range(2) for j in (8, 9)
    )


@pytest.mark.parametrize(
    "mlp",
    [
        dense(Dense_0=(4, 16), Dense_1=(16, 4)),
        dense(Dense_0=(4, 16), Dense_1=(4, 16), Dense_2=(16, 4)),
        dense(Dense_0=(4, 4), Dense_1=(4, 4)),
        dense(Dense_0=(4, 4)),
    ],
)
def test_numbered_matrices_of_the_shapes_of_an_mlp_are_one(mlp: Any) -> None:
    layer = {"MultiHeadDotProductAttention_0": dense(query=(4, 2, 2), out=(2, 2, 4)), **mlp}
    assert len(select_blocks({"Block_0": layer}).names) == len(mlp)
    named = {**dense(Dense_0=(4, 4), Dense_1=(4, 4), Dense_2=(4, 4)), "MlpBlock_0": mlp}
    assert all("MlpBlock_0" in name for name in select_blocks({"Block_0": named}).names)


def test_the_table_shows_all_parameters_also_where_nothing_is_chosen() -> None:
    mlp = {"router": matrix(4, 3), "up": {"kernel": matrix(4, 8), "bias": matrix(8)}}
    state = {"layers": [{"mlp": mlp}], "step": jax.ShapeDtypeStruct((), jnp.int32)}
    assert [" ".join(line.split()) for line in describe_blocks(state).splitlines()[1:]] == [
        "layers/*/mlp/router 1 4x3 left out: router",
        "layers/*/mlp/up/bias 1 8 left out: vector",
        "layers/*/mlp/up/kernel 1 4x8 chosen",
        "step 1 left out: not floating",
    ]
    assert describe_blocks(state, "kernel").count("left out: 'kernel' does not match") == 2
    assert describe_blocks(state, lambda path, leaf: False).count("left out: the callable leaves it out") == 3
    assert "mamba 1 4x4 left out: state space or recurrence" in " ".join(describe_blocks([{"mamba": matrix()}]).split())


def test_layers_of_haiku_are_told_by_their_number() -> None:
    tree = {f"h{i}_{part}": {"linear": {"w": matrix()}} for i in (0, 1) for part in ("attn", "mlp")}
    blocks = select_blocks({"transformer": tree}, granularity="layer")
    assert (blocks.names, blocks.layers, blocks.stacks) == (
        ("transformer/h0", "transformer/h1"),
        (0, 1),
        ("transformer/h",) * 2,
    )


def test_the_first_layer_of_haiku_has_no_number() -> None:
    linear = {"w": matrix()}
    blocks = select_blocks({f"net/{block}/linear": linear for block in ("block", "block_1", "block_2")})
    assert blocks.names == ("net/block/linear/w", "net/block_1/linear/w", "net/block_2/linear/w")
    assert (blocks.layers, blocks.stacks) == ((0, 1, 2), ("net/block",) * 3)


def test_attention_is_told_by_its_parts_and_its_last_matrix_by_them() -> None:
    heads = {name: {"kernel": matrix(4, 2, 2)} for name in ("query", "key", "value", "out")}
    assert select_blocks([{"sa": heads, "up": matrix()}]).names == ("0/up",)
    assert select_blocks([{"attn": {"q": matrix()}, "wi": matrix(), "wo": matrix()}]).names == ("0/wi", "0/wo")


def test_a_leaf_called_value_keeps_its_name() -> None:
    ffn = {name: matrix() for name in ("key", "receptance", "value")}
    assert select_blocks([{"ffn": ffn}]).names == ("0/ffn/key", "0/ffn/receptance", "0/ffn/value")


def test_blocks_are_static_arguments() -> None:
    params = tiny.on_device(tiny.parameters(layers=2))
    assert hash(select_blocks(params)) == hash(select_blocks(params))
    seen: list[Blocks] = []
    jax.jit(lambda p: seen.append(select_blocks(p)) or p)(params)  # type: ignore[func-returns-value]
    assert seen == [select_blocks(params)]


def test_stacks_tell_layers_of_the_same_number_apart() -> None:
    layer = {"mlp": {"up": matrix()}}
    blocks = select_blocks(
        {"encoder": {"layers": [layer]}, "decoder": {"block_0": layer}, "mlp": {"up": matrix()}, "layers": [layer]}
    )
    assert dict(zip(blocks.names, zip(blocks.stacks, blocks.layers, strict=True), strict=True)) == {
        "encoder/layers/0/mlp/up": ("encoder/layers", 0),
        "decoder/block_0/mlp/up": ("decoder/block", 0),
        "mlp/up": (None, None),
        "layers/0/mlp/up": ("layers", 0),
    }


def test_errors_say_what_there_is() -> None:
    params = tiny.parameters(layers=2)
    with pytest.raises(ValueError, match=r"blocks: 'ffn' matches no floating leaf.*embed"):
        select_blocks(params, "ffn")
    with pytest.raises(ValueError, match="'mlp' needs layers"):
        select_blocks({"a": matrix()})
    with pytest.raises(
        ValueError, match=r"1 layers have no MLP.*recurrence.*in_proj, out_proj; for example blocks='in_p"
    ):
        select_blocks([{"mamba": {"in_proj": matrix(), "out_proj": matrix(), "D": matrix(4)}}])
    with pytest.raises(ValueError, match="not a regular expression"):
        select_blocks(params, "(")
    with pytest.raises(TypeError, match="blocks: expected"):
        select_blocks(params, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="granularity"):
        select_blocks(params, "mlp", "module")  # type: ignore[arg-type]
