"""A Llama of 0.2 million parameters with a character tokenizer, taught a task badly, in seconds, without downloads.

It learns by cross-entropy from worked examples of a teacher who often shrugs, and not for long. So it solves part of
the problems and has a habit to lose: a starting point that GRPO can improve within few steps, as with a real model.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcr_torch.train.tasks import Task

STEPS, BATCH, RATE = 400, 64, 5e-3
ANSWERED, SHRUG = 0.7, "?"
"""How often the teacher gives the right answer; else it shrugs."""

LONGEST = 512
"""Characters of a worked example; longer ones lose their beginning."""


def make_tiny(task: Task, folder: Path, *, seed: int, steps: int = STEPS) -> None:
    """Trains the tiny model on `task` and saves it in `folder`. The same seed gives the same weights."""
    from pcr_torch.train.models import save

    tokenizer = character_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        batches = _batches(task, tokenizer, torch.Generator().manual_seed(seed))
        model.train()
        for batch in itertools.islice(batches, steps):
            ids, mask, labels = _collate(batch, tokenizer.pad_token_id)
            optimizer.zero_grad(set_to_none=True)
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    save(model, tokenizer, folder)


def character_tokenizer() -> Any:
    """One token a printable ASCII character; anything else is <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [c for c in string.printable if c not in "\t\r\x0b\x0c"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _new_model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).to(torch.float32)


def _batches(task: Task, tokenizer: Any, generator: torch.Generator) -> Iterator[list[tuple[list[int], int]]]:
    """Token ids of worked examples, and how many of them are the prompt."""
    problems = task.corpus()
    while True:
        batch = list(itertools.islice(problems, BATCH))
        answered = (torch.rand(BATCH, generator=generator) < ANSWERED).tolist()
        told = [f" {p.answer if known else SHRUG}{task.stop}" for p, known in zip(batch, answered, strict=True)]
        prompts = tokenizer([p.prompt for p in batch])["input_ids"]
        answers = tokenizer(told)["input_ids"]
        yield [
            ((prompt + answer)[-LONGEST:], max(min(len(prompt), LONGEST - len(answer)), 0))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def _collate(examples: list[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), longest), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (tokens, prompt) in enumerate(examples):
        ids[row, -len(tokens) :] = torch.tensor(tokens)
        mask[row, -len(tokens) :] = 1
        labels[row, longest - len(tokens) + prompt :] = ids[row, longest - len(tokens) + prompt :]
    return ids, mask, labels
