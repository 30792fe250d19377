"""What a subclass does to the loss, the batch or the model counts as it does for the stock trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as stock_trainer
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_runs import GROUP, relative_error, save_model, train

from pcr_torch.trl import PCRConfig, PCRTrainer
from pcr_torch.trl.groups import shuffle_groups

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _stock_shuffles_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same random numbers and microbatches in both trainers."""

    def by_groups(batch: dict[str, Any]) -> dict[str, Any]:
        return shuffle_groups(batch, torch.arange(batch["completion_ids"].shape[0]) // GROUP)

    monkeypatch.setattr(stock_trainer, "shuffle_sequence_dict", by_groups)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


class Halved:
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * 0.5  # type: ignore[misc]


class InPlace:
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs).mul_(3.0).div_(2.0)  # type: ignore[misc]


class Dropped:
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * 0  # type: ignore[misc]


class WithoutSuper:
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        model.eval()
        return self._compute_loss(model, inputs)  # type: ignore[attr-defined]


class Annealed:
    """beta moves with the number of microbatches."""

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        self.beta = 0.1 / self.calls
        return super()._compute_loss(model, inputs)  # type: ignore[misc]


class KLToASecondModel:
    """Of the same text; the reference is asked for first."""

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        if not hasattr(self, "second"):
            self.second = copy.deepcopy(self.ref_model)  # type: ignore[attr-defined]
            with torch.no_grad():
                for parameter in self.second.parameters():
                    parameter.mul_(1.3)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        keep = inputs["completion_ids"].shape[1]
        with torch.no_grad():
            other = self._get_per_token_logps_and_entropies(self.second, ids, mask, keep)[0]  # type: ignore[attr-defined]
        return super()._compute_loss(model, {**inputs, "ref_per_token_logps": other})  # type: ignore[misc]


class Repeats:
    """Rows that are dropped or repeated where completions are generated."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        rows = torch.tensor([0, 1, GROUP, GROUP + 1, 0, 1, GROUP, GROUP + 1])
        n = len(output["completion_ids"])
        return {k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == n else v for k, v in output.items()}


KINDS = [Halved, InPlace, Dropped, WithoutSuper, Annealed, KLToASecondModel, Repeats]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_stock_trainer_subclassed_alike(kind: type, folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reference_noise": 0.3, "gradient_accumulation_steps": 2 if kind is Annealed else 1}
    stock, expected = train(type("Stock", (kind, GRPOTrainer), {}), GRPOConfig, folder, tmp_path, **options)
    mine, got = train(type("Mine", (kind, PCRTrainer), {}), PCRConfig, folder, tmp_path, rule="grpo", **options)
    assert len(got.steps) == len(expected.steps) == 2
    for one, other in zip(got.steps, expected.steps, strict=True):
        if kind is Dropped:
            assert all(not gradient.any() for gradient in (*one.values(), *other.values()))
        else:
            assert relative_error(one, other) < 3e-6
    assert getattr(mine, "calls", 0) == getattr(stock, "calls", 0)


def test_a_batch_whose_groups_were_lost_is_grouped_by_its_prompts(folder: Path, tmp_path: Path) -> None:
    class Forgetful(PCRTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            return {key: value for key, value in output.items() if key != "pcr_group_ids"}

    _, expected = train(PCRTrainer, PCRConfig, folder, tmp_path)
    _, got = train(Forgetful, PCRConfig, folder, tmp_path)
    assert relative_error(got.steps[0], expected.steps[0]) < 1e-5


class Turns(TrainerCallback):
    """Trains one layer at a time."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for name, parameter in model.named_parameters():
            if "layers." in name:
                parameter.requires_grad_(f"layers.{state.global_step % 2}." in name)
                parameter.grad = None


def test_layers_may_be_trained_in_turns(folder: Path, tmp_path: Path) -> None:
    """Each step's blocks are those of the layer that is trained; the gradient is the stock trainer's."""
    steps = []
    for cls, config, options in ((GRPOTrainer, GRPOConfig, {}), (PCRTrainer, PCRConfig, {"rule": "grpo"})):

        class InTurns(cls):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.add_callback(Turns())

        trainer, found = train(InTurns, config, folder, tmp_path, **options)
        steps.append(found.steps)
    assert {block.layer for block in trainer.last_report.blocks} == {1}
    for one, other in zip(*steps, strict=True):
        assert relative_error(one, other) < 3e-6


def probed(module: Any) -> bool:
    return hasattr(getattr(module.forward, "__func__", None), "probes")


def test_the_model_is_its_own_before_and_after_training(folder: Path, tmp_path: Path) -> None:
    trainer, _ = train(PCRTrainer, PCRConfig, folder, tmp_path)
    assert not any(map(probed, trainer.model.modules()))
    other = PCRTrainer(
        model=trainer.model,
        reward_funcs=trainer.reward_funcs,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        processing_class=trainer.processing_class,
    )
    assert not any(map(probed, other.model.modules()))
    report = trainer.last_report
    trainer.train()
    assert trainer.last_report is not report


def test_numbers_given_as_text_and_blocks_that_cannot_be_saved() -> None:
    options = {"output_dir": "out", "report_to": "none", "bf16": False}
    config = PCRConfig(**options, beta="0.04", max_boost="3", every="1")  # type: ignore[arg-type]
    assert (config.beta, config.max_boost, config.every) == (0.04, 3.0, 1)
    with pytest.raises(ValueError, match="max_boost: expected a number, got 'many'"):
        PCRConfig(**options, beta=0.04, max_boost="many")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="blocks: a config is saved as text"):
        PCRConfig(**options, beta=0.04, blocks=lambda name, parameter: True)  # type: ignore[arg-type]
