"""Tiny random transformers and GRPO batches that all tests of the torch adapter share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import pcr_core
from pcr_core import Objective

ARCHITECTURES = ("llama", "qwen2", "gpt2")
_SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tiny_model(
    architecture: str, *, lora: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**_SMALL, num_key_value_heads=1))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**_SMALL, num_key_value_heads=1, tie_word_embeddings=True))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        )
    with torch.no_grad():  # larger than the usual initialisation, so that gradients are not all alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["c_fc", "c_proj"] if architecture == "gpt2" else ["gate_proj", "down_proj", "q_proj"]
        model = get_peft_model(model, LoraConfig(r=3, target_modules=targets, lora_dropout=0.0))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    return model.to(dtype)


@dataclass(frozen=True)
class Batch:
    tokens: Tensor
    mask: Tensor
    group_ids: Tensor
    advantages: Tensor
    prompt: int

    def logp(self, model: nn.Module) -> Tensor:
        """(n, T) log-probabilities of the response tokens."""
        logits = model(input_ids=self.tokens).logits[:, self.prompt - 1 : -1].float()
        return logits.log_softmax(-1).gather(-1, self.tokens[:, self.prompt :, None]).squeeze(-1)

    def objective(self, logp: Tensor, **options: object) -> Objective[Tensor]:
        """Off-policy and away from the reference, so that clip, ratio and KL all matter."""
        generator = torch.Generator().manual_seed(5)
        old = logp.detach() + 0.2 * torch.randn(logp.shape, generator=generator)
        reference = logp.detach() + 0.5 * torch.randn(logp.shape, generator=generator)
        return pcr_core.grpo_objective(logp, old, reference, self.advantages, self.mask, beta=0.1, **options)  # type: ignore[arg-type]

    def rows(self, index: list[int]) -> Batch:
        i = torch.tensor(index)
        return Batch(self.tokens[i], self.mask[i], self.group_ids[i], self.advantages[i], self.prompt)


def batch(n: int = 6, prompt: int = 3, length: int = 5, seed: int = 1, vocabulary: int = 31) -> Batch:
    """Two groups, of n - 2 and of 2 responses, interleaved; responses of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    group_ids = torch.zeros(n, dtype=torch.int64)
    group_ids[[1, n - 1]] = 7
    prompts = torch.randint(vocabulary, (8, prompt), generator=generator)
    responses = torch.randint(vocabulary, (n, length), generator=generator)
    mask = torch.ones(n, length, dtype=torch.bool)
    mask[0, 3:] = False
    mask[2, 4:] = False
    advantages = torch.randn(n, generator=generator)
    return Batch(torch.cat([prompts[group_ids], responses], dim=1), mask, group_ids, advantages, prompt)
