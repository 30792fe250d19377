"""A decoder-only transformer in flax nnx: Llama's architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

Cache: TypeAlias = tuple[tuple[Array, Array], ...]
"""Keys and values of each layer, (n, length, heads, width / heads)."""

ROTARY_BASE = 10000.0
EPSILON = 1e-6
INITIAL = jax.nn.initializers.normal(0.02)


@dataclass(frozen=True)
class Size:
    """Of the tiny model by default: 0.2 million parameters. The embedding is the output matrix too."""

    vocabulary: int
    width: int = 64
    hidden: int = 176
    layers: int = 4
    heads: int = 4


class Transformer(nnx.Module):  # type: ignore[misc]
    """Logits of the next token.

    Example:
        >>> model = Transformer(Size(vocabulary=9, layers=1), nnx.Rngs(0))
        >>> model(jnp.zeros((2, 5), jnp.int32), jnp.zeros((2,), jnp.int32)).shape
        (2, 5, 9)
    """

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        self.size = size
        self.embed = nnx.Param(INITIAL(rngs.params(), (size.vocabulary, size.width)))
        self.layers = nnx.List([Layer(size, rngs) for _ in range(size.layers)])
        self.norm = RMSNorm(size.width)

    def __call__(self, tokens: Array, start: Array) -> Array:
        """(n, length, vocabulary) logits of (n, length) tokens; start: (n,), the columns at which rows begin."""
        return self.extend(self.empty_cache(*tokens.shape), tokens, start, 0)[0]

    def extend(self, cache: Cache, tokens: Array, start: Array, at: int | Array) -> tuple[Array, Cache]:
        """Logits of `tokens` (n, new), which stand at columns `at`, ..., and the cache that holds them too."""
        columns = at + jnp.arange(tokens.shape[1])
        length = cache[0][0].shape[1]
        seen = jnp.arange(length) <= columns[:, None]
        seen = seen[None] & (jnp.arange(length) >= start[:, None, None])  # (n, new, length)
        positions = columns[None, :] - start[:, None]  # a row's text begins at 0, whatever its padding
        h = self.embed.get_value()[tokens]
        grown = []
        for layer, past in zip(self.layers, cache, strict=True):
            h, present = layer(h, past, seen, positions, at)
            grown.append(present)
        return self.norm(h) @ self.embed.get_value().T, tuple(grown)

    def empty_cache(self, n: int, length: int) -> Cache:
        shape = (n, length, self.size.heads, self.size.width // self.size.heads)
        empty = jnp.zeros(shape, self.embed.get_value().dtype)
        return tuple((empty, empty) for _ in self.layers)


class Layer(nnx.Module):  # type: ignore[misc]
    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        self.attn_norm, self.mlp_norm = RMSNorm(size.width), RMSNorm(size.width)
        self.attn, self.mlp = Attention(size, rngs), MLP(size, rngs)

    def __call__(self, h: Array, past: Any, seen: Array, positions: Array, at: int | Array) -> tuple[Array, Any]:
        mixed, present = self.attn(self.attn_norm(h), past, seen, positions, at)
        h = h + mixed
        return h + self.mlp(self.mlp_norm(h)), present


class Attention(nnx.Module):  # type: ignore[misc]
    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        self.heads = size.heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, Linear(size.width, size.width, rngs))

    def __call__(self, x: Array, past: Any, seen: Array, positions: Array, at: int | Array) -> tuple[Array, Any]:
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q_proj, self.k_proj, self.v_proj))
        keys = jax.lax.dynamic_update_slice_in_dim(past[0], rotate(k, positions), at, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(past[1], v, at, axis=1)
        scores = jnp.einsum("nqhd,nkhd->nhqk", rotate(q, positions), keys) / q.shape[-1] ** 0.5
        # a finite bound: a column of padding sees nothing, and with infinities it would be NaN
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, jnp.finfo(scores.dtype).min))
        mixed = jnp.einsum("nhqk,nkhd->nqhd", weights, values)
        return self.o_proj(mixed.reshape(x.shape)), (keys, values)


class MLP(nnx.Module):  # type: ignore[misc]
    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        self.gate_proj = Linear(size.width, size.hidden, rngs)
        self.up_proj = Linear(size.width, size.hidden, rngs)
        self.down_proj = Linear(size.hidden, size.width, rngs)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Linear(nnx.Module):  # type: ignore[misc]
    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(INITIAL(rngs.params(), (inputs, outputs)))

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel.get_value()


class RMSNorm(nnx.Module):  # type: ignore[misc]
    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Array) -> Array:
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + EPSILON) * self.scale.get_value()


def rotate(x: Array, positions: Array) -> Array:
    """Rotary positions of (n, length, heads, d): the pairs (i, i + d/2) turn at their own frequencies."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * ROTARY_BASE ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
