"""Tiny models on which the loop in float64 is fast, and batches for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
)

VOCABULARY = 67
# microbatches of a step: tokens, and of each response its group and how many of its tokens are no padding
Batch = tuple[tuple[int, tuple[int, ...], tuple[int, ...] | None], ...]
EVEN: Batch = ((20, (0, 0, 0, 0, 1, 1, 1, 1), None),)
UNEQUAL: Batch = ((19, (0, 0, 1, 1, 1), None), (33, (2, 3, 3, 2, 2, 3, 3), None))
PADDED: Batch = ((21, (0, 0, 0, 1, 1, 1, 1), (21, 3, 12, 20, 1, 17, 9)),)


def configs(width: int) -> dict[str, Callable[[], PretrainedConfig]]:
    """By name; the MLP is twice as wide, so that from 256 on an accelerator's kernels serve its weights."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    gpt2: dict[str, Any] = {"n_embd": width, "n_inner": 2 * width, "n_layer": 2, "n_head": 2}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return {
        "Llama": lambda: LlamaConfig(**sizes, tie_word_embeddings=False),
        "Llama, tied": lambda: LlamaConfig(**sizes, tie_word_embeddings=True),
        "Qwen2": lambda: Qwen2Config(**sizes, tie_word_embeddings=False),
        "GPT-2": lambda: GPT2Config(vocab_size=VOCABULARY, **gpt2, **dropout),
        "Llama with LoRA": lambda: LlamaConfig(**sizes, tie_word_embeddings=False),
        "Mixtral": lambda: MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2),
    }


def missing(name: str) -> str:
    """Why a model cannot be had here; "" if it can."""
    return "peft is not installed" if "LoRA" in name and find_spec("peft") is None else ""


def make(name: str, width: int, seed: int) -> Any:
    """In float32 on the CPU."""
    torch.manual_seed(seed)
    config = configs(width)[name]()
    config._experts_implementation = "eager"  # the others know no float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    with torch.no_grad():  # further from linear than at initialisation
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    if "LoRA" in name:
        from peft import LoraConfig, get_peft_model

        kind: Any = {"r": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"], "init_lora_weights": False}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **kind))
    return model.train()


@dataclass(frozen=True)
class Microbatch:
    """Token ids (n, T + 1), their mask if some are padding, groups (n,), and two cotangents (n, T)."""

    tokens: Tensor
    mask: Tensor | None
    groups: Tensor
    cotangents: tuple[Tensor, Tensor]

    def logp(self, model: Any, dtype: torch.dtype) -> Tensor:
        logits = model(input_ids=self.tokens, attention_mask=self.mask, use_cache=False).logits[:, :-1].to(dtype)
        taken: Tensor = logits.log_softmax(-1).gather(-1, self.tokens[:, 1:, None])[..., 0]
        return taken


def microbatches(batch: Batch, seed: int, device: str, dtype: torch.dtype) -> Iterator[Microbatch]:
    """The same numbers on any device; the second cotangent is smaller, and partly against the first."""
    generator = torch.Generator().manual_seed(seed)
    for length, groups, held in batch:
        n = len(groups)
        tokens = torch.randint(VOCABULARY, (n, length + 1), generator=generator)
        first, other = torch.randn(2, n, length, generator=generator, dtype=torch.float64)
        mask = None
        if held is not None:
            mask = (torch.arange(length + 1) <= torch.tensor(held)[:, None]).long()
            first, other = first * mask[:, 1:], other * mask[:, 1:]
        cotangents = first.to(device, dtype), (0.3 * other - 0.2 * first).to(device, dtype)
        mask = None if mask is None else mask.to(device)
        yield Microbatch(tokens.to(device), mask, torch.tensor(groups, device=device), cotangents)


def autocast(device: str, on: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if on else contextlib.nullcontext()
