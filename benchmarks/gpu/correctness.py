"""Updates of both tiers on the device against the per-response loop in float64 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen2Config

import pcr_core
from benchmarks.gpu.bench import Bench
from pcr_torch import PCR

TINY = {"vocab_size": 67, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
WITHOUT, WITH = pcr_core.PCR(alpha=0.7), pcr_core.PCR(alpha="snr")


def correctness(bench: Bench) -> None:
    """Updates of both tiers on the device against the loop's on the CPU in float64."""
    heads = {"num_key_value_heads": 1}
    models: dict[str, PretrainedConfig] = {
        "Llama": LlamaConfig(**TINY, **heads),
        "Qwen2, tied": Qwen2Config(**TINY, **heads, tie_word_embeddings=True),
        "GPT-2": GPT2Config(vocab_size=67, n_embd=48, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        "Mixtral": MixtralConfig(**TINY, **heads, num_local_experts=4, num_experts_per_tok=2),
    }
    for name, config in models.items():
        loop = {"norms": "loop", "noise_every": 1}
        exact = {
            rule: _update(_model(config, torch.float64), rule, "cpu", torch.float64, **loop) for rule in (WITHOUT, WITH)
        }
        for how in ("float32", "bf16 autocast", "bf16 weights", "float32, checkpointed"):
            weights = torch.bfloat16 if how == "bf16 weights" else torch.float32
            for rule, tier in ((WITHOUT, "without noise"), (WITH, "with noise")):
                if name == "Mixtral" and rule == WITH:
                    continue  # one backward pass a response: the loop itself
                model = _model(config, weights).to(bench.device)
                if "checkpointed" in how:
                    model.train().gradient_checkpointing_enable({"use_reentrant": False})
                with torch.autocast(bench.device.type, torch.bfloat16, enabled="autocast" in how):
                    got = _update(model, rule, bench.device, torch.float32, noise_every=int(rule == WITH))
                error = max(_error(got[key].double().cpu(), exact[rule][key]) for key in exact[rule])
                allowed = 2e-4 if "float32" in how else 0.2
                bench.add("correctness", model=name, how=how, tier=tier, error=error, right=error <= allowed)


def _model(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.to(dtype)


def _update(model: Any, rule: Any, device: Any, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Gradients of all parameters after a step of two microbatches: unequal groups, padding, odd lengths."""
    generator = torch.Generator().manual_seed(1)
    method = PCR(model, rule=rule, **options)
    for n, length in ((5, 19), (7, 33)):
        tokens = torch.randint(67, (n, length + 1), generator=generator).to(device)
        mask = torch.arange(length) < torch.randint(length // 2, length + 1, (n, 1), generator=generator)
        cotangents = [(torch.randn(n, length, generator=generator) * mask).to(device, dtype) for _ in range(2)]
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].to(dtype)
        logp = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        ids = (torch.arange(n) >= 2).long().to(device)
        method.accumulate_cotangents(logp, cotangents[0], 0.3 * cotangents[1] - cotangents[0], group_ids=ids)
    method.resolve()
    method.remove()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / (expected.norm() + 1e-6))
