"""What a model answers, and how likely it finds a text; leaves its mode and all random states as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def measuring(model: Any, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, a random state of its own; mode and random state come back."""
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)


def respond(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, batch: int = 64
) -> list[str]:
    """One completion a prompt, greedy at temperature 0; ends where `models.load` said responses end."""
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=max_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    out: list[str] = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(
            list(prompts[start : start + batch]), return_tensors="pt", padding=True, padding_side="left"
        ).to(model.device)
        ids = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config
        )
        out += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


def text_nll(model: Any, tokenizer: Any, text: str) -> float:
    """Mean negative log-likelihood of `text`, nats a token."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    logits = model(input_ids=ids).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
