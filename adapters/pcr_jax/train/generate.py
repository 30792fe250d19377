"""Responses of a transformer, sampled or greedy, in one compiled program a shape, with a cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from pcr_jax.records import register


@dataclass(frozen=True)
class Responses:
    """A pytree of arrays (n, T).

    Attributes:
        tokens: the pad token after the end of a response.
        logp: of each token, at the temperature it was sampled at; 0 after the end.
        mask: True on tokens of the response, the one that ends it included.
        ended: (n,) whether it came to an end within T tokens.
    """

    tokens: Array
    logp: Array
    mask: Array
    ended: Array


register(Responses)


@partial(jax.jit, static_argnames=("structure", "length", "greedy", "pad"))
def generate(
    structure: Any,
    params: Any,
    prompts: Array,
    start: Array,
    keys: Array,
    *,
    length: int,
    stop: Array,
    temperature: float | Array = 1.0,
    greedy: bool = False,
    pad: int = 0,
) -> Responses:
    """Up to `length` tokens after each prompt.

    Args:
        structure, params: of `nnx.split` of a model with `extend` and `empty_cache`, such as `Transformer`.
        prompts: (n, P) tokens, padded on the left.
        start: (n,) column at which each prompt begins.
        keys: (n,) random keys, one a response: what a row draws does not depend on the others.
        stop: (vocabulary,) boolean, tokens that end a response.
        temperature: > 0; also of `logp`.
        greedy: the most likely token each time.
        pad: the token after the end.
    """
    model = nnx.merge(structure, params)
    n, width = prompts.shape
    logits, cache = model.extend(model.empty_cache(n, width + length), prompts, start, 0)
    nothing = Responses(
        jnp.full((n, length), pad, prompts.dtype),
        jnp.zeros((n, length), logits.dtype),
        jnp.zeros((n, length), bool),
        jnp.zeros(n, bool),
    )

    def going_on(carry: Any) -> Array:
        step, _, _, out = carry
        return (step < length) & ~jnp.all(out.ended)

    def one_token(carry: Any) -> Any:
        step, logits, cache, out = carry
        logp = jax.nn.log_softmax(logits / temperature)
        if greedy:
            token = jnp.argmax(logp, axis=-1)
        else:
            token = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(keys, logp)
        token = jnp.where(out.ended, pad, token).astype(prompts.dtype)
        chosen = jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]
        out = Responses(
            out.tokens.at[:, step].set(token),
            out.logp.at[:, step].set(jnp.where(out.ended, 0, chosen)),
            out.mask.at[:, step].set(~out.ended),
            out.ended | stop[token],
        )
        logits, cache = model.extend(cache, token[:, None], start, width + step)
        return step + 1, logits[:, 0], cache, out

    out: Responses = jax.lax.while_loop(going_on, one_token, (jnp.int32(0), logits[:, -1], cache, nothing))[3]
    return out


def token_logp(
    structure: Any, params: Any, tokens: Array, start: Array, *, length: int, temperature: float = 1.0
) -> Array:
    """(n, length) log-probabilities of the last `length` columns of (n, P + length) tokens, from one forward pass."""
    logits = nnx.merge(structure, params)(tokens[:, :-1], start)[:, -length:]
    logp = jax.nn.log_softmax(logits / temperature)
    return jnp.take_along_axis(logp, tokens[:, -length:, None], axis=-1)[..., 0]


def pad_left(rows: list[list[int]], pad: int, multiple: int = 16) -> tuple[Array, Array]:
    """Tokens (n, P) and the columns at which rows begin; P is a multiple, so that few shapes are compiled."""
    width = -(-max(len(row) for row in rows) // multiple) * multiple
    tokens = [[pad] * (width - len(row)) + row for row in rows]
    return jnp.asarray(tokens, jnp.int32), jnp.asarray([width - len(row) for row in rows], jnp.int32)
