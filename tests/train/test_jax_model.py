"""The JAX transformer against torch's Llama, and its sampling with a cache against one whole forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from llama import as_llama

from pcr_jax.train.generate import generate, pad_left, token_logp
from pcr_jax.train.model import Size, Transformer
from pcr_jax.train.tiny import new_tiny
from pcr_torch.train.tiny import _new_model, character_tokenizer
from pcr_train.lessons import END, PAD, VOCABULARY, CharacterTokenizer

ROWS = [[5, 6, 7, 8, 9], [3, 4], [9, 8, 7, 6, 5, 4, 3], [11]]
STOP = jnp.arange(len(VOCABULARY)) % 9 == 5


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    """Far from its small initial values, so that every part matters."""
    structure, params = new_tiny(0)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return structure, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)


def test_the_model_is_torchs_tiny_llama_padding_included(model: tuple[Any, Any]) -> None:
    structure, params = model
    tokens, start = pad_left(ROWS, VOCABULARY[PAD], multiple=4)
    mine = np.asarray(jax.jit(lambda params: nnx.merge(structure, params)(tokens, start))(params))
    mask = np.arange(tokens.shape[1]) >= np.asarray(start)[:, None]
    with torch.no_grad():
        theirs = as_llama(params)(
            input_ids=torch.tensor(np.asarray(tokens)).long(), attention_mask=torch.tensor(mask).long()
        ).logits.numpy()
    assert np.abs(mine - theirs)[mask].max() <= 1e-4 * np.abs(theirs[mask]).max()
    assert np.isfinite(mine).all()


def test_characters_are_torchs() -> None:
    texts = ["12 + 3 =", "a\nb é\t", ""]
    mine, theirs = CharacterTokenizer(), character_tokenizer()
    assert mine(texts)["input_ids"] == theirs(texts)["input_ids"]
    for ids in (mine(["1 + 1 = 2\n"])["input_ids"][0], [VOCABULARY["7"], VOCABULARY[END], VOCABULARY[PAD]]):
        assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_of_cached_sampling_are_those_of_one_forward_pass(
    model: tuple[Any, Any], temperature: float
) -> None:
    structure, params = model
    prompts, start = pad_left(ROWS, VOCABULARY[PAD])
    keys = jax.random.split(jax.random.key(2), len(ROWS))
    out = generate(structure, params, prompts, start, keys, length=10, stop=STOP, temperature=temperature)
    whole = jnp.concatenate([prompts, out.tokens], axis=1)
    logp = jax.jit(lambda params: token_logp(structure, params, whole, start, length=10, temperature=temperature))(
        params
    )
    assert jnp.abs(jnp.where(out.mask, logp - out.logp, 0)).max() <= 1e-5
    assert out.mask.sum() > 20
    assert not (out.logp * ~out.mask).any()


def test_a_response_ends_with_its_first_stop_token(model: tuple[Any, Any]) -> None:
    structure, params = model
    prompts, start = pad_left(ROWS, VOCABULARY[PAD])
    keys = jax.random.split(jax.random.key(2), len(ROWS))
    out = generate(structure, params, prompts, start, keys, length=10, stop=STOP, pad=VOCABULARY[PAD])
    assert len(set(np.asarray(out.mask).sum(1).tolist())) > 1, "all responses equally long: nothing is tested"
    for tokens, mask, ended in zip(*map(np.asarray, (out.tokens, out.mask, out.ended)), strict=True):
        stops = [i for i, token in enumerate(tokens) if STOP[token] and mask[i]]
        assert stops == ([mask.sum() - 1] if ended else [])
        assert (tokens[~mask] == VOCABULARY[PAD]).all()
        assert mask.all() or ended


def test_greedy_responses_are_the_most_likely_tokens_whatever_the_padding_and_the_batch(
    model: tuple[Any, Any],
) -> None:
    structure, params = model
    keys = jax.random.split(jax.random.key(0), len(ROWS))
    never = jnp.zeros(len(VOCABULARY), bool)
    prompts, start = pad_left(ROWS, VOCABULARY[PAD], multiple=16)
    out = generate(structure, params, prompts, start, keys, length=6, stop=never, greedy=True).tokens
    forward = jax.jit(lambda params, tokens: nnx.merge(structure, params)(tokens, jnp.zeros(1, jnp.int32)))
    for row, tokens in list(zip(ROWS, np.asarray(out).tolist(), strict=True))[:2]:
        logits = forward(params, jnp.asarray([row + tokens]))  # without padding, alone
        assert logits[0, len(row) - 1 : -1].argmax(-1).tolist() == tokens


def test_sampling_follows_the_probabilities_at_its_temperature_and_rows_differ(model: tuple[Any, Any]) -> None:
    structure, params = model
    draws, temperature = 4000, 0.5
    prompts, start = pad_left([ROWS[0]] * draws, VOCABULARY[PAD], multiple=1)
    keys = jax.random.split(jax.random.key(3), draws)
    out = generate(structure, params, prompts, start, keys, length=1, stop=STOP, temperature=temperature)
    logits = jax.jit(lambda params: nnx.merge(structure, params)(prompts[:1], start[:1]))(params)[0, -1]
    expected = jax.nn.softmax(logits / temperature)
    found = np.bincount(np.asarray(out.tokens)[:, 0], minlength=len(VOCABULARY)) / draws
    error = np.sqrt(np.asarray(expected * (1 - expected)) / draws)
    assert np.abs(found - np.asarray(expected)).max() <= 5 * error.max()
    assert (found > 0).sum() > 5


def test_size_counts() -> None:
    small = replace(Size(vocabulary=7), width=8, hidden=12, layers=2, heads=2)
    params = nnx.split(Transformer(small, nnx.Rngs(0)))[1]
    assert sum(x.size for x in jax.tree.leaves(params)) == 7 * 8 + 8 + 2 * (2 * 8 + 4 * 64 + 3 * 96)
    theirs = sum(p.numel() for p in _new_model(character_tokenizer()).parameters())
    assert sum(x.size for x in jax.tree.leaves(new_tiny(0)[1])) == theirs
