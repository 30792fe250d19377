"""A Llama of 0.2 million parameters with a character tokenizer, taught a task badly, in seconds, without downloads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcr_torch.train.saving import save
from pcr_train.lessons import ANSWERED, END, PAD, RATE, STEPS, UNKNOWN, VOCABULARY, Lesson, lessons
from pcr_train.tasks import Task


def make_tiny(task: Task, folder: Path, *, seed: int, steps: int = STEPS) -> None:
    """Trains the tiny model on `task` and saves it in `folder`. The same seed gives the same weights."""
    tokenizer = character_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        generator = torch.Generator().manual_seed(seed)
        batches = lessons(task, tokenizer, lambda n: (torch.rand(n, generator=generator) < ANSWERED).tolist())
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

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
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


def _collate(examples: list[Lesson], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        begin = longest - len(example.ids)
        ids[row, begin:] = torch.tensor(example.ids)
        mask[row, begin:] = 1
        labels[row, begin + example.prompt :] = ids[row, begin + example.prompt :]
    return ids, mask, labels
