"""Models as their libraries write them, without a mark of ours: what is tapped, and whether it is right."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from test_jax_taps import assert_right, measured

WIDTH, HEADS, WORDS = 4, 2, 3


def x() -> Any:
    return jnp.zeros((2, 5, WIDTH))


def first_word(logits: Any) -> Any:
    return jax.nn.log_softmax(logits.astype("float32"))[..., 0]


class NnxLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 7, rngs=rngs)
        self.down = nnx.LinearGeneral((7,), (WIDTH,), rngs=rngs)
        self.low_rank = nnx.LoRA(WIDTH, 2, WIDTH, rngs=rngs)

    def __call__(self, h: Any) -> Any:
        h = h + self.attn(self.norm(h))
        return h + self.down(nnx.gelu(self.up(self.norm(h)))) + self.low_rank(h)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([NnxLayer(rngs)])
        self.head = nnx.Linear(WIDTH, WORDS, rngs=rngs)

    def __call__(self, h: Any) -> Any:
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def of_nnx() -> tuple[Any, Any]:
    structure, params, rest = nnx.split(Nnx(nnx.Rngs(0)), nnx.Any(nnx.Param, nnx.LoRAParam), ...)
    return lambda params, rows: first_word(nnx.merge(structure, params, rest)(rows["x"])), params


class LinenLayer(linen.Module):
    dtype: Any = None

    @linen.compact
    def __call__(self, h: Any, _: Any = None) -> Any:
        norm = linen.LayerNorm(dtype=self.dtype)(h)
        h = h + linen.MultiHeadDotProductAttention(HEADS, dtype=self.dtype)(norm, norm)
        up = linen.DenseGeneral((2, 5), name="wi", dtype=self.dtype)(h)
        mixed = linen.gelu(up[..., 0, :]) * up[..., 1, :]
        return h + linen.Dense(WIDTH, name="wo", dtype=self.dtype)(mixed), None


class Linen(linen.Module):
    way: str = "plain"

    @linen.compact
    def __call__(self, h: Any) -> Any:
        dtype = jnp.bfloat16 if self.way == "bfloat16" else None
        if self.way == "scan":
            layers = linen.scan(LinenLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            h, _ = layers(name="layers")(h, None)
        elif self.way == "scan of remat along axis 1":
            each = linen.remat(LinenLayer, prevent_cse=False)
            layers = linen.scan(each, variable_axes={"params": 1}, split_rngs={"params": True}, length=2)
            h, _ = layers(name="layers")(h, None)
        else:
            each = linen.remat(LinenLayer) if self.way == "remat" else LinenLayer
            h, _ = each(name="layers_0", dtype=dtype)(h)
        return linen.Dense(WORDS, name="head")(h)


def of_linen(way: str) -> tuple[Any, Any]:
    model = Linen(way)
    params = model.init(jax.random.key(1), x())
    return lambda params, rows: first_word(model.apply(params, rows["x"])), params


def of_equinox() -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(0), 4)
    parts = {
        "attn": eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0]),
        "mlp": eqx.nn.MLP(WIDTH, WIDTH, 7, depth=1, key=keys[1]),
        "head": eqx.nn.Linear(WIDTH, WORDS, key=keys[2]),
    }
    params, static = eqx.partition(parts, eqx.is_inexact_array)

    def logp_fn(params: Any, rows: Any) -> Any:
        model = eqx.combine(params, static)

        def one(h: Any) -> Any:
            h = h + model["attn"](h, h, h)
            h = h + jax.vmap(model["mlp"])(h)
            return first_word(jax.vmap(model["head"])(h))

        return jax.vmap(one)(rows["x"])

    return logp_fn, params


def of_haiku() -> tuple[Any, Any]:
    def forward(h: Any) -> Any:
        h = h + hk.MultiHeadAttention(HEADS, 2, w_init_scale=1.0, model_size=WIDTH)(h, h, h)
        h = h + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(7)(h)))
        return first_word(hk.Linear(WORDS)(h))

    model = hk.without_apply_rng(hk.transform(forward))
    return lambda params, rows: model.apply(params, rows["x"]), model.init(jax.random.key(0), x())


MODELS: dict[str, tuple[Any, int]] = {  # what makes it, and how many matrices it has
    "nnx: Linear, LinearGeneral, MultiHeadAttention, LoRA": (of_nnx, 9),
    "linen": (lambda: of_linen("plain"), 7),
    "linen, remat": (lambda: of_linen("remat"), 7),
    "linen, scan": (lambda: of_linen("scan"), 7),
    "linen, scan of remat along axis 1": (lambda: of_linen("scan of remat along axis 1"), 7),
    "equinox": (of_equinox, 7),
    "haiku": (of_haiku, 7),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_tapped_and_the_rest_is_copied(name: str) -> None:
    make, matrices = MODELS[name]
    logp_fn, params = make()
    how, reason = measured(logp_fn, params, "all")
    assert how is not None, reason
    assert len({tap.kernel.leaf for tap in how.taps.values()}) == matrices
    assert len(how.copied) == len(jax.tree.leaves(params)) - matrices
    assert_right(logp_fn, params, "all", bound=2e-5)


def test_lower_precision_inside() -> None:
    logp_fn, params = of_linen("bfloat16")
    assert_right(logp_fn, params, r"layers_.*(wi|wo)/kernel", bound=0.05)
