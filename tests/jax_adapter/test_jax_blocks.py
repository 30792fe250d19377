"""Block selection by path, on the namings people use."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import linen, nnx

from pcr_jax import Blocks, select_blocks


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


def test_stacked_layers_are_one_block_a_matrix() -> None:
    stack = {
        "attn": {"wq": matrix(3, 4, 4)},
        "mlp": {"up": {"kernel": matrix(3, 4, 8), "bias": matrix(3, 8)}},
        "ln_1": {"scale": matrix(3, 4)},
    }
    blocks = select_blocks({"layers": stack, "embed": matrix()})
    assert blocks.names == ("layers/mlp/up/kernel",)
    assert blocks.layers == (None,)


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
    with pytest.raises(ValueError, match="not a regular expression"):
        select_blocks(params, "(")
    with pytest.raises(TypeError, match="blocks: expected"):
        select_blocks(params, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="granularity"):
        select_blocks(params, "mlp", "module")  # type: ignore[arg-type]
