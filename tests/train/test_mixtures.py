"""Mixtures of experts, whose checkpoints have other names than their parameters, through pcr-train."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pcr_torch.train import models
from pcr_torch.train.engine import TorchEngine
from pcr_torch.train.tiny import character_tokenizer
from pcr_train.progress import read_metrics
from pcr_train.run import Outcome, train
from pcr_train.settings import Settings
from pcr_train.tasks import Task

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_experts_per_tok": 2, "bos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, Callable[..., Any]] = {
    "mixtral": lambda **options: MixtralForCausalLM(
        MixtralConfig(intermediate_size=24, num_local_experts=3, **SMALL, **options)
    ),
    "qwen3_moe": lambda **options: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(intermediate_size=24, moe_intermediate_size=12, num_experts=3, **SMALL, **options)
    ),
}


@pytest.mark.parametrize(("name", "router_loss"), [("mixtral", 0.0), ("qwen3_moe", 0.1)])
def test_two_steps_and_two_more_are_four_bit_for_bit(
    name: str, router_loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Task, "score", lambda self, problem, text: len(text) % 3 / 2)  # a random model solves nothing
    monkeypatch.setattr(TorchEngine, "respond", lambda self, prompts, **_: [""] * len(prompts))
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    model = MODELS[name](
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trained: list[dict[str, torch.Tensor]] = []

    def ended(self: TorchEngine, text: str) -> float:  # the last measurement of a run
        trained.append({key: p.detach().clone() for key, p in self.model.named_parameters()})
        return 0.0

    monkeypatch.setattr(TorchEngine, "text_nll", ended)

    def go(out: Path, steps: int, resume: bool = False) -> Outcome:
        settings = Settings(
            model=str(tmp_path / "model"), shots=0, steps=steps, prompts=2, generations=4, max_tokens=5, heldout=2,
            samples=1, retention_task="none", learning_rate=1e-2, save_every=2, prior="temporal",
            router_loss=router_loss,
        )  # fmt: skip
        return train(settings, out, resume=resume, console=Console(quiet=True), plot=False)

    whole = go(tmp_path / "whole", 4)
    start, expected = trained[0], trained[-1]
    moved = [key for key in expected if not torch.equal(start[key], expected[key])]
    assert any("experts" in key for key in moved)
    assert len(moved) == len(expected)
    shutil.copytree(go(tmp_path / "rest", 2).folder, tmp_path / "moved")
    rest = go(tmp_path / "moved", 4, resume=True)
    assert trained[-1].keys() == expected.keys()
    assert [key for key in expected if not torch.equal(trained[-1][key], expected[key])] == []
    rows, others = ([{**row, "seconds": 0} for row in read_metrics(outcome.metrics)] for outcome in (rest, whole))
    assert rows == others


def test_a_router_loss_is_refused_by_its_option_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "make_tiny", functools.partial(models.make_tiny, steps=1))
    settings = Settings(model="tiny", shots=0, steps=1, prompts=2, generations=4, max_tokens=5, heldout=2, samples=1,
                        retention_task="none", router_loss=0.1)  # fmt: skip
    with pytest.raises(ValueError, match="--router-loss: tiny is no mixture of experts"):
        train(settings, tmp_path / "run", console=Console(quiet=True), plot=False)
    with pytest.raises(ValueError, match="--router-loss: expected a number >= 0, got -1"):
        Settings(router_loss=-1)
