"""A small model in a folder, and runs of TRL's trainer and of `PCRTrainer` on it, for tests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from pcr_torch.distributed import local

GROUP = 4


def save_model(path: Path) -> Path:
    """A random character-level Llama on disk, where TRL finds its reference model."""
    vocabulary = {c: i for i, c in enumerate("_$abcdefghijklmnopqrstuvwxyz ")}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="_", eos_token="$", unk_token="_", padding_side="left"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def reward(completions: list[str], **_: Any) -> list[float]:
    return [len(set(c)) / 5 + c.count("a") for c in completions]


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})


def train(
    cls: Any, config: Any, folder: Path, out: Path, resume: str | bool | None = None, **options: Any
) -> tuple[Any, Gradients]:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "beta": 0.1,
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 3,
    }
    prompts = Dataset.from_dict({"prompt": ["ab", "cde", "f g", "hij", "kl", "mno", "pq", "rs"]})
    peft_config = options.pop("peft_config", None)
    reference_noise = options.pop("reference_noise", 0.0)
    trainer = cls(
        model=LlamaForCausalLM.from_pretrained(folder),
        reward_funcs=reward,
        args=config(**(settings | options)),
        train_dataset=prompts,
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        peft_config=peft_config,
    )
    if reference_noise:  # a reference that is not the policy: a KL gradient from the first step on
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in map(local, trainer.ref_model.parameters()):
                parameter.mul_(1 + reference_noise * torch.randn(parameter.shape, generator=generator))
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, gradients


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    error = sum(float((got[n] - expected[n]).double().square().sum()) for n in expected)
    return math.sqrt(error / sum(float(g.double().square().sum()) for g in expected.values()))
