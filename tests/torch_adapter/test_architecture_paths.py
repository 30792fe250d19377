"""Architectures of transformers, tiny and random: what is chosen, which path is taken, that both tiers are right."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from problems import batch
from steps import gradients
from torch import Tensor, nn

import pcr_core
from pcr_torch import PCR, Report

SMALL = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8,
          "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEAD = {"head_dim": 8}
PER_LAYER = {"head_dim": 8, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 31,
             "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 4}
GATED, FUSED = "down_proj gate_proj up_proj", "down_proj gate_up_proj"
BOTH = "down_proj gate_proj gate_up_proj up_proj"
FALCON = "dense_4h_to_h dense_h_to_4h"


class Case(NamedTuple):
    """What "mlp" finds, and how its noise is measured: "fast", "loop", or "mixed" of both."""

    blocks: int
    families: str
    path: str = "fast"
    options: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "Llama": Case(6, GATED),
    "Qwen2": Case(6, GATED),
    "Qwen3": Case(6, GATED, "fast", HEAD),
    "Mistral": Case(6, GATED),
    "Gemma": Case(6, GATED, "fast", HEAD),
    "Gemma2": Case(6, GATED, "fast", HEAD),
    "Gemma3Text": Case(6, GATED, "fast", HEAD),
    "Gemma3nText": Case(
        6,
        GATED,
        "fast",
        PER_LAYER | {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]},
    ),
    "Gemma4Text": Case(6, GATED, "fast", PER_LAYER | {"global_head_dim": 8}),
    "Olmo2": Case(6, GATED),
    "Cohere": Case(6, GATED),
    "Cohere2": Case(6, GATED),
    "StableLm": Case(6, GATED),
    "SeedOss": Case(6, GATED, "fast", {"attention_dropout": 0.0, "residual_dropout": 0.0}),
    "Exaone4": Case(6, GATED),
    "Helium": Case(6, GATED, "fast", HEAD),
    "Starcoder2": Case(4, "c_fc c_proj"),
    "Phi": Case(4, "fc1 fc2", "fast", {"resid_pdrop": 0.0}),
    "Phi3": Case(4, FUSED),
    "OPT": Case(4, "fc1 fc2", "fast", {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "GPTJ": Case(
        4,
        "fc_in fc_out",
        "fast",
        {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_inner": 24,
            "rotary_dim": 4,
            "resid_pdrop": 0,
            "embd_pdrop": 0,
            "attn_pdrop": 0,
        },
    ),
    "GPT2": Case(
        4,
        "c_fc c_proj",
        "fast",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    ),
    "GPTNeoX": Case(4, FALCON),
    "Mpt": Case(4, "down_proj up_proj", "fast", {"d_model": 16, "n_layers": 2, "n_heads": 2, "expansion_ratio": 2}),
    "Bloom": Case(4, FALCON, "fast", {"n_layer": 2, "n_head": 2}),
    "Falcon": Case(4, FALCON),
    "Lfm2": Case(
        6, "w1 w2 w3", "fast", {"block_multiple_of": 8, "layer_types": ["conv", "full_attention"], "block_ff_dim": 24}
    ),
    "Mixtral": Case(4, FUSED, "loop", LOCAL),
    "Qwen2Moe": Case(10, BOTH, "mixed", EXPERTS | {"shared_expert_intermediate_size": 8, "decoder_sparse_step": 1}),
    "Qwen3Moe": Case(4, FUSED, "loop", EXPERTS | HEAD),
    "GptOss": Case(4, FUSED, "loop", LOCAL | HEAD),
    "GraniteMoe": Case(4, FUSED, "loop", LOCAL),
    "Olmoe": Case(4, FUSED, "loop", EXPERTS),
    "Glm4Moe": Case(8, BOTH, "mixed", ROUTED | HEAD),
    "DeepseekV3": Case(
        8,
        BOTH,
        "mixed",
        ROUTED | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    ),
    "Llama4Text": Case(
        8,
        BOTH,
        "mixed",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 24,
            "head_dim": 8,
            "moe_layers": [1],
        },
    ),
    "Qwen3Next": Case(
        10,
        BOTH,
        "mixed",
        EXPERTS
        | {
            "shared_expert_intermediate_size": 8,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "Jamba": Case(
        5,
        BOTH,
        "mixed",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    "Bamba": Case(6, GATED, "fast", MAMBA | {"attn_layer_indices": [1]}),
    "FalconH1": Case(6, GATED, "fast", MAMBA | {"mamba_d_ssm": 16, "mamba_n_heads": 2, "head_dim": 8}),
    "RecurrentGemma": Case(
        6,
        GATED,
        "fast",
        {"lru_width": 16, "head_dim": 8, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    "NemotronH": Case(
        6,
        "down_proj up_proj",
        "mixed",
        MAMBA
        | HEAD
        | {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "mlp", "attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 1,
            "chunk_size": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "moe_shared_expert_intermediate_size": 8,
        },
    ),
    # its cache is written in place, which no backward pass survives: off, as it is while training
    "Rwkv": Case(
        6, "key receptance value", "fast", {"attention_hidden_size": 16, "context_length": 16, "use_cache": False}
    ),
}
SHOWN = ("Llama", "GPT2", "OPT", "Falcon", "Bloom", "Gemma3nText", "Lfm2", "Mixtral", "GptOss", "DeepseekV3",
         "Llama4Text", "Qwen3Next", "NemotronH", "RecurrentGemma", "Rwkv")  # fmt: skip
each = pytest.mark.parametrize(  # those that take no way through the library that another does not are slow
    "name", [name if name in SHOWN else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
RULE, NOISY = pcr_core.PCR(alpha=0.7), pcr_core.PCR(alpha="snr")


def made(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SMALL | dict(CASES[name].options)))
    kinds = (f"{name.removesuffix('Text')}ForCausalLM", f"{name}ForCausalLM", f"{name}LMHeadModel")
    kind = next(getattr(transformers, k) for k in kinds if hasattr(transformers, k))
    model = kind(config).eval()
    with torch.no_grad():  # larger than the usual initialisation, so that gradients are not all alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def step(model: nn.Module, rule: Any, **options: Any) -> tuple[Report, dict[str, Tensor], PCR]:
    model.zero_grad()
    method, data = PCR(model, rule=rule, **options), batch()
    logp = data.logp(model)
    method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
    report = method.resolve()
    method.remove()
    return report, gradients(model), method


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    most = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():  # a gradient that is 0 but for rounding, as of a key's bias, is as good
        assert (got[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7 * most, name


@functools.cache
def with_the_loop(name: str, rule: pcr_core.PCR = RULE) -> tuple[Report, dict[str, Tensor]]:
    report, expected, _ = step(made(name), rule, norms="loop", noise_every=1)
    return report, expected


def assert_statistics_close(got: pcr_core.BlockStatistics[Tensor], expected: pcr_core.BlockStatistics[Tensor]) -> None:
    for one, other, product in (
        ("plasticity_sq", "stability_sq", "dot"),
        ("plasticity_var", "stability_var", "covariance"),
    ):
        if getattr(got, one) is None:
            assert getattr(got, other) is getattr(got, product) is None
            continue
        for field in (one, other):
            torch.testing.assert_close(getattr(got, field), getattr(expected, field), rtol=1e-4, atol=0)
        bound = 1e-4 * (getattr(expected, one) * getattr(expected, other)).sqrt()
        assert ((getattr(got, product) - getattr(expected, product)).abs() <= bound).all(), product


@each
def test_without_noise(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Bit for bit what a plain backward pass gives, for the sum; the loop's update for PCR; no word of a slow path."""
    model, data, case = made(name), batch(), CASES[name]
    logp = data.logp(model)
    objective = data.objective(logp)
    logp.backward(objective.plasticity_cotangent + objective.stability_cotangent)
    plain = gradients(model)
    with caplog.at_level(logging.WARNING, "pcr_torch"):
        got = step(model, pcr_core.GRPO(), noise_every=0)[1]
        assert got.keys() == plain.keys()
        assert all(torch.equal(got[key], plain[key]) for key in plain)
        report, update, method = step(model, RULE, noise_every=0)
        assert report.path == "autograd"
        assert report.statistics.plasticity_var is None
        assert step(model, RULE)[0].path == ("fast" if case.path == "fast" else "autograd")
    assert not [record for record in caplog.records if record.name == "pcr_torch"]
    loop, expected = with_the_loop(name)
    assert_statistics_close(report.statistics, loop.statistics)
    assert_close(update, expected)
    assert len(method.blocks) == case.blocks
    assert " ".join(sorted({block.family for block in method.blocks})) == case.families


@each
@pytest.mark.parametrize("rule", [RULE, NOISY], ids=["every step", "needed"])
def test_with_noise(name: str, rule: pcr_core.PCR) -> None:
    report, update, method = step(made(name), rule, noise_every=1 if rule is RULE else None)
    loop, expected = with_the_loop(name, rule)
    assert report.path == method.norms == CASES[name].path
    fused = {key for key, way in method.path.items() if way != "fast"}  # nothing else needs the loop
    assert fused == {key for key in method.path if "experts." in key and "shared" not in key}
    assert_statistics_close(report.statistics, loop.statistics)
    assert_close(update, expected)


@each
@pytest.mark.parametrize("noise_every", [0, 1])
def test_checkpointed(name: str, noise_every: int) -> None:
    model = made(name).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    report, update, _ = step(model, RULE, noise_every=noise_every)
    assert report.path == (CASES[name].path if noise_every else "autograd")
    assert_close(update, with_the_loop(name)[1])


def test_the_documentation_has_the_table() -> None:
    """docs/supported.md: name, matrices, path with noise."""
    text = (Path(__file__).parents[2] / "docs/supported.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\w, ]+) \| right \| (fast|mixed|loop) \|$", text, re.MULTILINE)
    assert rows == [(name, case.families.replace(" ", ", "), case.path) for name, case in CASES.items()]
