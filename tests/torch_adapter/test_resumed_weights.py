"""A resumed model is the one that was saved, whatever names its checkpoint has, or the run is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_owners import llava
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl_runs import train

from pcr_torch import checkpoint_files
from pcr_torch.trl import PCRConfig, PCRTrainer, weights

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


class Counting(LlamaForCausalLM):  # type: ignore[misc]
    """A model with a buffer that is saved, as running means are, and one that is not."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("scratch", torch.rand(3), persistent=False)


@pytest.mark.parametrize("kept", [True, False])
def test_persistent_buffers_come_back_too(kept: bool, tmp_path: Path) -> None:
    trained = Counting(LlamaConfig(**_SMALL))
    trained.seen += 5
    saved = weights.digests(trained)
    assert "seen" in saved
    assert "scratch" not in saved
    trained.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if not kept:
        del tensors["seen"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    resumed = Counting(LlamaConfig(**_SMALL))
    resumed.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "seen"}, strict=False)
    if kept:
        weights.restore(resumed, str(tmp_path), saved)
        assert torch.equal(resumed.seen, trained.seen)
    else:
        with pytest.raises(ValueError, match=r"1 of 22 weights are not those .* such as seen"):
            weights.restore(resumed, str(tmp_path), saved)


@pytest.mark.parametrize("lora", [False, True], ids=["a reference model", "the model without its adapters"])
def test_another_reference_is_refused(lora: bool, folder: Path, tmp_path: Path) -> None:
    """The folder that both models come from is changed between the runs, where no checkpoint has a copy."""
    start = tmp_path / "start"
    shutil.copytree(folder, start)
    options = {"save_strategy": "steps", "save_steps": 1}
    options["peft_config"] = LoraConfig(r=2, target_modules=["up_proj"]) if lora else None
    train(PCRTrainer, PCRConfig, start, tmp_path / "run", max_steps=1, **options)
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    _, gradients = train(PCRTrainer, PCRConfig, start, tmp_path / "run", resume=checkpoint, max_steps=2, **options)
    assert len(gradients.steps) == 1
    changed = load_file(start / "model.safetensors")
    changed["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(changed, start / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"reference model: 1 of its .*layers\.1\.mlp\.down_proj"):
        train(PCRTrainer, PCRConfig, start, tmp_path / "run", resume=checkpoint, max_steps=3, **options)


def test_the_best_model_is_the_one_that_was_saved(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded when training ends, of names that the trainer by itself does not know; or told to be missing."""
    monkeypatch.setattr("trl_runs.LlamaForCausalLM", MixtralForCausalLM)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "router_aux_loss_coef": 0.0}

    def best(trainer: Any) -> Any:
        trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
        trainer._load_best_model()
        return weights.digests(trainer.model)

    trainer, _ = train(PCRTrainer, PCRConfig, mixture, tmp_path, **options)
    last = weights.digests(trainer.model)
    saved = torch.load(tmp_path / "checkpoint-1" / "pcr_state.pt", weights_only=True)["weights"]
    assert best(trainer) == saved != last
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"load_best_model_at_end: .*checkpoint-1.* is not there any more"):
        best(trainer)


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
    monkeypatch.setattr("trl_runs.LlamaForCausalLM", MixtralForCausalLM)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "rule": "grpo"} | {
        "router_aux_loss_coef": 0.0
    }
    whole, expected = train(PCRTrainer, PCRConfig, mixture, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    rest, got = train(PCRTrainer, PCRConfig, mixture, tmp_path / "rest", resume=str(checkpoint), **options)
    assert all(torch.equal(got.steps[0][name], gradient) for name, gradient in expected.steps[2].items())
    for (name, one), other in zip(rest.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other), name


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pcr_state.pt", "trainer_state.json"]


def cut_off(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def flipped(data: bytes) -> bytes:
    """One bit of the middle, where a file holds its numbers."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = [
    *((name, damage, True) for name in FILES for damage in (cut_off, flipped)),
    *((name, cut_off, False) for name in FILES),  # without checksums, by their formats
    *((name, flipped, False) for name in ("optimizer.pt", "pcr_state.pt")),
]


@pytest.mark.parametrize(("name", "damage", "sealed"), DAMAGES)
def test_damaged_files_are_named(
    name: str, damage: Callable[[bytes], bytes], sealed: bool, saved_once: Path, folder: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(saved_once, checkpoint)
    if not sealed:  # as on the hub
        (checkpoint / "checksums.json").unlink()
    assert checkpoint_files.damaged(checkpoint) is None
    file = checkpoint / name
    file.write_bytes(damage(file.read_bytes()))
    assert checkpoint_files.damaged(checkpoint) == file
    with pytest.raises(ValueError, match=rf"({name} is damaged|not written to its end).*earlier checkpoint"):
        train(PCRTrainer, PCRConfig, folder, tmp_path / "rest", resume=str(checkpoint), max_steps=2)
    assert file.exists()


def test_a_flipped_bit_in_a_weight_is_refused_without_checksums_too(
    saved_once: Path, folder: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(saved_once, checkpoint)
    (checkpoint / "checksums.json").unlink()
    file = checkpoint / "model.safetensors"
    file.write_bytes(flipped(file.read_bytes()))
    with pytest.raises(ValueError, match="1 of 21 weights are not those that were saved"):
        train(PCRTrainer, PCRConfig, folder, tmp_path / "rest", resume=str(checkpoint), max_steps=2)


def test_true_resumes_the_newest_whole_checkpoint(
    saved_once: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        shutil.copytree(saved_once, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    file = tmp_path / "checkpoint-2" / "optimizer.pt"
    file.write_bytes(cut_off(file.read_bytes()))
    _, gradients = train(PCRTrainer, PCRConfig, folder, tmp_path, resume=True, max_steps=2)
    assert len(gradients.steps) == 1
    assert f"checkpoint-2 is passed over: {file} is damaged" in caplog.text
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"holds no whole checkpoint \(2 are damaged"):
        train(PCRTrainer, PCRConfig, folder, tmp_path, resume=True, max_steps=2)


@pytest.mark.parametrize("whole", [True, False])
def test_the_only_older_checkpoint_is_deleted_when_the_newer_is_verified(
    whole: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = PCRTrainer._save_rng_state

    def torn(self: Any, out: str) -> None:
        write(self, out)
        if out.endswith("2") and not whole:
            file = Path(out) / "optimizer.pt"
            file.write_bytes(cut_off(file.read_bytes()))

    monkeypatch.setattr(PCRTrainer, "_save_rng_state", torn)
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    train(PCRTrainer, PCRConfig, folder, tmp_path, max_steps=2, **options)
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert left == (["checkpoint-2"] if whole else ["checkpoint-1", "checkpoint-2"])
    assert ("optimizer.pt is damaged as soon as it was written" in caplog.text) != whole


@pytest.fixture(scope="module")
def saved_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved")
    train(PCRTrainer, PCRConfig, folder, out, save_strategy="steps", save_steps=1, max_steps=1)
    return out / "checkpoint-1"
