"""PCRTrainer where layers are frozen and unfrozen: from the head down, by turns, within a step, over a resumption."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as stock
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_runs import relative_error, train

from pcr_torch.trl import PCRConfig, PCRTrainer
from pcr_torch.trl.carried_state import state_of

pytestmark = pytest.mark.filterwarnings("ignore")
SGD: dict[str, Any] = {"reference_noise": 0.3, "optim": "sgd", "learning_rate": 0.05, "max_steps": 3}
HEAD_DOWN = [["lm_head"], ["lm_head", "layers.1."], ["lm_head", "layers.1.", "layers.0."]]
TURNS = [["layers.0.", "layers.1."], ["layers.1."], ["layers.0."], ["layers.0.", "layers.1."]]


@pytest.fixture(autouse=True)
def _same_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)


class Stages(TrainerCallback):
    """What is trained in each step: parameters whose name has one of the parts."""

    def __init__(self, stages: Sequence[Sequence[str]]) -> None:
        self.stages = stages

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        only(model, self.stages[min(state.global_step, len(self.stages) - 1)])


class WithinAStep(TrainerCallback):
    """After the first micro-batch of each step."""

    def __init__(self, part: str, trained: bool) -> None:
        self.part, self.trained = part, trained

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for name, parameter in model.named_parameters():
            if self.part in name:
                parameter.requires_grad_(self.trained)


def only(model: Any, parts: Sequence[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
        parameter.grad = None


def staged(base: Any, callback: Callable[[], TrainerCallback], at_first: Sequence[str] | None = None) -> Any:
    class Staged(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if at_first is not None:
                only(kwargs["model"], at_first)
            super().__init__(*args, **kwargs)
            self.add_callback(callback())
            self.bound: list[tuple[Any, Any]] = []

        def _bind(self, model: Any) -> Any:
            before = None if self.method is None else state_of(self.method, ())
            made = super()._bind(model)
            if hasattr(self, "bound") and before is not None:
                self.bound.append((before, state_of(made, ())))
            return made

    return Staged


def against_stock(
    callback: Callable[[], TrainerCallback], at_first: Any, folder: Path, out: Path, **options: Any
) -> Any:
    _, expected = train(staged(GRPOTrainer, callback, at_first), GRPOConfig, folder, out, **SGD | options)
    own = {"rule": "grpo", "log_layers": True}
    mine, got = train(staged(PCRTrainer, callback, at_first), PCRConfig, folder, out, **SGD | options | own)
    assert len(got.steps) == len(expected.steps) > 0
    for one, other in zip(got.steps, expected.steps, strict=True):
        assert relative_error(one, other) <= 1e-6
    return mine


def test_gradual_unfreezing_from_the_head_down(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Until a block is trained the plain sum is."""
    with caplog.at_level(logging.WARNING, "pcr_torch"):
        mine = against_stock(
            lambda: Stages(HEAD_DOWN), None, folder, tmp_path, save_strategy="steps", save_steps=1, max_steps=3
        )
    assert "Until then what is trained takes the plain sum" in caplog.text
    logged = ["pcr/conflict_rate" in entry for entry in mine.state.log_history[:3]]
    assert logged == [False, True, True]
    assert len(mine.last_report.blocks) == 6


def test_a_model_whose_blocks_are_all_frozen_is_refused_with_a_way_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is frozen, such as .* in a callback's on_train_begin"):
        train(staged(PCRTrainer, lambda: Stages(HEAD_DOWN), ["lm_head"]), PCRConfig, folder, tmp_path, **SGD)


def test_a_layer_unfrozen_within_a_step_is_a_block_from_the_next_one(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"gradient_accumulation_steps": 4, "max_steps": 2}
    with caplog.at_level(logging.WARNING, "pcr_torch"):
        mine = against_stock(lambda: WithinAStep("layers.1.", True), ["layers.0."], folder, tmp_path, **options)
    assert caplog.text.count("unfrozen between the micro-batches of a step") == 1
    layers = [{key[:12] for key in entry if key.startswith("pcr/layer_")} for entry in mine.state.log_history[:2]]
    assert layers == [{"pcr/layer_00"}, {"pcr/layer_00", "pcr/layer_01"}]


def test_a_layer_frozen_within_a_step_is_refused(folder: Path, tmp_path: Path) -> None:
    cls = staged(PCRTrainer, lambda: WithinAStep("layers.1.", False))
    with pytest.raises(ValueError, match=r"layers\.1\..* was frozen between the micro-batches of a step"):
        train(cls, PCRConfig, folder, tmp_path, gradient_accumulation_steps=2, **SGD)


# -- the temporal prior --------------------------------------------------------------------------------------------

TEMPORAL: dict[str, Any] = {"prior": "temporal", "alpha": "variance", "max_steps": 4}


@pytest.mark.parametrize("granularity", ["tensor", "module", "layer"])
def test_blocks_that_stay_keep_their_prior_and_new_ones_start_afresh(
    granularity: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pcr_torch"):
        mine, _ = train(
            staged(PCRTrainer, lambda: Stages(TURNS)), PCRConfig, folder, tmp_path, granularity=granularity, **TEMPORAL
        )
    changes = [(a, b) for a, b in mine.bound if a["parameters"] != b["parameters"]]
    assert len(changes) == 3
    stay = fresh = 0
    for before, after in changes:
        if before["prior"] is None:
            continue
        for stream in ("plasticity", "stability"):
            for k, name in enumerate(after["blocks"]):
                variance, means = after["prior"][stream]["variance"][k], after["prior"][stream]["mean"]
                if name in before["blocks"]:
                    stay += 1
                    old = before["prior"][stream]
                    assert variance == old["variance"][before["blocks"].index(name)] < math.inf
                    assert all(torch.equal(means[p], old["mean"][p]) for p in after["parameters"][name])
                else:
                    fresh += 1
                    assert variance == math.inf
                    assert not means.keys() & set(after["parameters"][name])
    assert stay > 0
    assert fresh > 0
    assert "their temporal prior starts afresh" in caplog.text


def test_a_block_that_stays_goes_on_as_if_the_others_had_not_changed(folder: Path, tmp_path: Path) -> None:
    """Weights stand still, so a layer's gradients do not depend on which others are trained."""
    options = TEMPORAL | {"learning_rate": 0.0, "reference_noise": 0.3}
    stages = [TURNS[0], TURNS[1], TURNS[0]]
    _, got = train(staged(PCRTrainer, lambda: Stages(stages)), PCRConfig, folder, tmp_path, **options)
    always = staged(PCRTrainer, lambda: Stages(TURNS[:1]))
    _, expected = train(always, PCRConfig, folder, tmp_path, **options)
    for one, other in zip(got.steps, expected.steps, strict=True):
        names = [name for name in one if "layers.1.mlp" in name]
        assert len(names) == 3
        assert relative_error({n: one[n] for n in names}, {n: other[n] for n in names}) <= 1e-6


@pytest.mark.parametrize("at_first", [None, ["layers.0."]], ids=["all", "one layer"])
def test_turns_are_resumed_bit_for_bit(at_first: Any, folder: Path, tmp_path: Path) -> None:
    """Whatever is trained when the checkpoint is loaded, before the callbacks choose."""
    options = TEMPORAL | {"save_strategy": "steps", "save_steps": 1}
    cls = staged(PCRTrainer, lambda: Stages([["layers.1."], ["layers.1."], TURNS[0], ["layers.1."]]), at_first)
    _, whole = train(cls, PCRConfig, folder, tmp_path / "whole", **options)
    for done in (1, 2, 3):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{done}")
        _, rest = train(cls, PCRConfig, folder, tmp_path / "rest", resume=checkpoint, **options)
        assert len(rest.steps) == 4 - done
        for got, expected in zip(rest.steps, whole.steps[done:], strict=True):
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("change", [{"granularity": "layer"}, {"blocks": r"layers\.1\.mlp"}])
def test_other_blocks_by_other_options_are_refused_when_resumed(
    change: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    options = TEMPORAL | {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    train(PCRTrainer, PCRConfig, folder, tmp_path, **options)
    with pytest.raises(ValueError, match="it belongs to 6 other blocks"):
        train(PCRTrainer, PCRConfig, folder, tmp_path, resume=str(tmp_path / "checkpoint-1"), **options | change)
