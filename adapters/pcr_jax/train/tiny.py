"""The tiny model of pcr-train in JAX: torch's lessons and torch's size, taught in one compiled program."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from pcr_jax.train.generate import pad_left, token_logp
from pcr_jax.train.model import Size, Transformer
from pcr_train.lessons import ANSWERED, PAD, RATE, STEPS, VOCABULARY, CharacterTokenizer, Lesson, lessons
from pcr_train.tasks import Task


def new_tiny(seed: int) -> tuple[Any, Any]:
    """Structure and parameters, as of `nnx.split`, before any lesson."""
    return nnx.split(Transformer(Size(len(VOCABULARY)), nnx.Rngs(seed)))  # type: ignore[no-any-return]


def make_tiny(task: Task, *, seed: int, steps: int = STEPS) -> Any:
    """Parameters that have learned `task`, badly. The same seed gives the same on the same machine."""
    structure, params = new_tiny(seed)
    schedule = optax.cosine_onecycle_schedule(steps, RATE)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b1=0.9, b2=0.99))

    def loss(params: Any, tokens: Array, start: Array, taught: Array) -> Array:
        logp = token_logp(structure, params, tokens, start, length=tokens.shape[1] - 1)
        return -jnp.sum(logp * taught[:, 1:]) / jnp.sum(taught[:, 1:])

    def step(params: Any, state: Any, tokens: Array, start: Array, taught: Array) -> tuple[Any, Any]:
        change, state = optimizer.update(jax.grad(loss)(params, tokens, start, taught), state, params)
        return optax.apply_updates(params, change), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    rng = np.random.default_rng(seed)
    batches = lessons(task, CharacterTokenizer(), lambda n: (rng.random(n) < ANSWERED).tolist())
    state = optimizer.init(params)
    for batch in itertools.islice(batches, steps):
        params, state = compiled(params, state, *_collate(batch))
    return params


def _collate(batch: list[Lesson]) -> tuple[Array, Array, Array]:
    """Tokens, where each row begins, and which of its tokens are taught."""
    tokens, start = pad_left([example.ids for example in batch], VOCABULARY[PAD])
    answers = np.asarray([example.prompt for example in batch])[:, None] + np.asarray(start)[:, None]
    return tokens, start, jnp.asarray(np.arange(tokens.shape[1]) >= answers)
