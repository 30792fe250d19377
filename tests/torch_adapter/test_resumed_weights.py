"""A resumed model is the one that was saved, whatever names its checkpoint has, or the run is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_owners import llava
from test_trl import train
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pcr_torch import checkpoints, weights
from pcr_torch.trl import PCRConfig, PCRTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
_SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**_SMALL, num_key_value_heads=1, num_local_experts=3))


def qwen3_moe() -> nn.Module:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SMALL, num_key_value_heads=1, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12)
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_SMALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, mixtral, qwen3_moe, llava])
def test_every_weight_comes_back_bit_for_bit(make: Callable[[], Any], dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained = make().to(dtype)
    saved = weights.digests(trained)
    assert saved is not None
    trained.save_pretrained(tmp_path)
    torch.manual_seed(2)
    resumed = make().to(dtype)
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)  # as the trainer does
    random = torch.get_rng_state()
    weights.restore(resumed, str(tmp_path), saved)
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), resumed.parameters(), strict=True))
    assert torch.equal(random, torch.get_rng_state())


def test_weights_that_no_file_holds_are_refused(tmp_path: Path) -> None:
    model = llama()
    saved = weights.digests(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of 21 weights are not those.*layers\.0\.mlp\.up_proj\.weight"):
        weights.restore(llama(), str(tmp_path), saved)


@pytest.fixture(scope="module")
def mixture(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a mixture of experts in place of the Llama; the tokenizer is the same."""
    path = tmp_path_factory.mktemp("mixture")
    shutil.copytree(folder, path, dirs_exist_ok=True)
    torch.manual_seed(0)
    options = {**_SMALL, "vocab_size": 29, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    MixtralForCausalLM(MixtralConfig(**options, num_key_value_heads=1, num_local_experts=3)).save_pretrained(path)
    return path


def test_a_mixture_of_experts_goes_on_as_it_was(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_trl.LlamaForCausalLM", MixtralForCausalLM)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "rule": "grpo"} | {
        "router_aux_loss_coef": 0.0
    }
    whole, expected = train(PCRTrainer, PCRConfig, mixture, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    rest, got = train(PCRTrainer, PCRConfig, mixture, tmp_path / "rest", resume=str(checkpoint), **options)
    assert all(torch.equal(got.steps[0][name], gradient) for name, gradient in expected.steps[2].items())
    for (name, one), other in zip(rest.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pcr_state.pt", "trainer_state.json"]
)
def test_files_that_were_cut_off_are_named(name: str, saved_once: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(saved_once, checkpoint)
    assert checkpoints.damaged(checkpoint) is None
    file = checkpoint / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    assert checkpoints.damaged(checkpoint) == file
    with pytest.raises(ValueError, match=rf"{name} is damaged.*earlier checkpoint"):
        train(PCRTrainer, PCRConfig, folder, tmp_path / "rest", resume=str(checkpoint), max_steps=2)
    assert file.exists()


@pytest.fixture(scope="module")
def saved_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved")
    train(PCRTrainer, PCRConfig, folder, out, save_strategy="steps", save_steps=1, max_steps=1)
    return out / "checkpoint-1"
