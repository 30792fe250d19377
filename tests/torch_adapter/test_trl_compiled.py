"""A model that the trainer compiles: both gradients from its compiled graph, without noise."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as stock
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch._dynamo.utils import counters
from trl import GRPOConfig, GRPOTrainer
from trl_runs import relative_error, train

from pcr_torch.trl import PCRConfig, PCRTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler and an accelerator that know of nothing before; the same microbatches in both trainers."""
    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)
    states = AcceleratorState, PartialState, GradientState
    for state in states:
        state._reset_state()
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    for state in states:
        state._reset_state()


SLOW = [pytest.param("inductor", rule, marks=pytest.mark.slow) for rule in ("grpo", "hard")]


@pytest.mark.parametrize(("backend", "rule"), [("eager", "grpo"), ("aot_eager", "grpo"), ("aot_eager", "hard"), *SLOW])
def test_gradients_are_those_of_the_stock_trainer_compiled_alike(
    backend: str, rule: str, folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "reference_noise": 0.3, "optim": "sgd", "learning_rate": 0.05, "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False, "max_steps": 1,
    }  # fmt: skip
    compiled = {"torch_compile": True, "torch_compile_backend": backend}
    if rule == "grpo":
        _, expected = train(GRPOTrainer, GRPOConfig, folder, tmp_path, **options, **compiled)
    else:
        _, expected = train(PCRTrainer, PCRConfig, folder, tmp_path, **options, rule=rule, noise_every=0)
    counters.clear()
    mine, got = train(PCRTrainer, PCRConfig, folder, tmp_path, **options, **compiled, rule=rule)
    assert counters["stats"]["unique_graphs"] > 0
    assert mine.last_report.path == "autograd"
    assert mine.last_report.blocks[0].name == "model.layers.0.mlp.gate_proj.weight"
    one, other = ({name.removeprefix("_orig_mod."): g for name, g in run.steps[0].items()} for run in (got, expected))
    assert relative_error(one, other) <= 3e-6


def test_accelerates_option_compiles_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with caplog.at_level(logging.WARNING, "pcr_torch"):
        trainer, _ = train(PCRTrainer, PCRConfig, folder, tmp_path, max_steps=1)
    assert counters["stats"]["unique_graphs"] > 0
    assert trainer.last_report.path == "autograd"
    assert caplog.text.count("in a compiled model the noise of the gradients is not measured") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "paper"}, "rule='paper' with these options reads it in every step"),
        ({"noise_every": 5}, "noise_every=5 asks for it; set it to 0"),
    ],
)
@pytest.mark.parametrize("by", ["trainer", "accelerate"])
def test_what_would_measure_noise_is_refused(
    by: str, options: dict[str, Any], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "accelerate":
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
        what = "dynamo_backend eager"
    else:
        options = options | {"torch_compile": True, "torch_compile_backend": "eager"}
        what = "torch_compile"
    with pytest.raises(ValueError, match=rf"^{what}: .*{message}"):
        train(PCRTrainer, PCRConfig, folder, tmp_path, **options)
