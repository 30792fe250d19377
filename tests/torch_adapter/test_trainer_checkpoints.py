"""Checkpoints of PCRTrainer: a resumed run goes on as the uninterrupted one did, bit for bit, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_runs import Gradients, relative_error, train

from pcr_torch.trl import PCRConfig, PCRTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def assert_goes_on(rest: Gradients, whole: Gradients, done: int) -> None:
    assert len(rest.steps) == len(whole.steps) - done > 0
    for got, expected in zip(rest.steps, whole.steps[done:], strict=True):
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_resumed_training_equals_uninterrupted(folder: Path, tmp_path: Path) -> None:
    """With a temporal prior, whose state is in the checkpoint as well; bit for bit."""
    options = SAVING | {"max_steps": 3, "prior": "temporal", "temperature": 1.0}
    _, whole = train(PCRTrainer, PCRConfig, folder, tmp_path / "whole", **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    assert (Path(checkpoint) / "pcr_state.pt").exists()
    _, rest = train(PCRTrainer, PCRConfig, folder, tmp_path / "rest", resume=checkpoint, **options)
    assert_goes_on(rest, whole, 2)


@pytest.mark.parametrize("options", [{"num_iterations": 2}, {"steps_per_generation": 2}], ids=str)
def test_resumed_while_a_generation_batch_is_in_use(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    settings = SAVING | options | {"max_steps": 4}
    _, whole = train(PCRTrainer, PCRConfig, folder, tmp_path / "whole", **settings)
    for done in (1, 2):
        checkpoint = tmp_path / "whole" / f"checkpoint-{done}"
        _, rest = train(PCRTrainer, PCRConfig, folder, tmp_path / "rest", resume=str(checkpoint), **settings)
        assert_goes_on(rest, whole, done)
    (tmp_path / "whole" / "checkpoint-1" / "pcr_rollouts_0_of_1.pt").unlink()
    with pytest.raises(ValueError, match="as many processes as it was saved on"):
        train(
            PCRTrainer,
            PCRConfig,
            folder,
            tmp_path / "rest",
            resume=str(tmp_path / "whole" / "checkpoint-1"),
            **settings,
        )


def test_a_moved_reference_cannot_be_resumed(folder: Path, tmp_path: Path) -> None:
    options = SAVING | {"sync_ref_model": True, "ref_model_sync_steps": 1}
    train(PCRTrainer, PCRConfig, folder, tmp_path, **options)
    with pytest.raises(ValueError, match="sync_ref_model has moved it"):
        train(PCRTrainer, PCRConfig, folder, tmp_path, resume=str(tmp_path / "checkpoint-1"), **options)


def test_a_training_that_was_interrupted_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_substep_end(self, *args: Any, **_: Any) -> None:
            raise KeyboardInterrupt

    trainer, gradients = train(
        PCRTrainer, PCRConfig, folder, tmp_path, max_steps=1, gradient_accumulation_steps=2, learning_rate=0.0
    )
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupt)
    for _ in range(2):  # the second starts as clean as can be
        trainer._step, trainer._buffered_inputs = 0, None
        torch.manual_seed(5)
        trainer.train()
    assert all(torch.equal(gradients.steps[-2][name], g) for name, g in gradients.steps[-1].items())


def test_a_checkpoint_of_another_trainer_is_refused(folder: Path, tmp_path: Path) -> None:
    train(GRPOTrainer, GRPOConfig, folder, tmp_path, max_steps=1, **SAVING)
    with pytest.raises(ValueError, match="was not written by PCRTrainer"):
        train(PCRTrainer, PCRConfig, folder, tmp_path, resume=str(tmp_path / "checkpoint-1"), max_steps=2)


EPOCHS = {"num_train_epochs": 2, "max_steps": -1}  # of four steps each


@pytest.mark.parametrize(
    "options", [{}, {"num_iterations": 2}, {"gradient_accumulation_steps": 3, "steps_per_generation": 2}], ids=str
)
def test_resumed_in_a_later_epoch(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Where the order of prompts is another, and an epoch's last step may be of fewer micro-batches."""
    settings = SAVING | EPOCHS | options
    _, whole = train(PCRTrainer, PCRConfig, folder, tmp_path / "whole", **settings)
    epoch = len(whole.steps) // 2
    for done in (epoch, epoch + 1):
        checkpoint = tmp_path / "whole" / f"checkpoint-{done}"
        _, rest = train(PCRTrainer, PCRConfig, folder, tmp_path / "rest", resume=str(checkpoint), **settings)
        assert_goes_on(rest, whole, done)


def test_the_place_within_a_generation_batch_is_that_of_micro_batches(folder: Path, tmp_path: Path) -> None:
    """Not of steps, of which the last in an epoch may be shorter."""
    settings = SAVING | {
        "max_steps": 6, "gradient_accumulation_steps": 2, "steps_per_generation": 3, "shuffle_dataset": False,
    }  # fmt: skip
    _, whole = train(PCRTrainer, PCRConfig, folder, tmp_path / "whole", **settings)
    for done in (2, 3, 4):
        checkpoint = tmp_path / "whole" / f"checkpoint-{done}"
        _, rest = train(PCRTrainer, PCRConfig, folder, tmp_path / "rest", resume=str(checkpoint), **settings)
        assert_goes_on(rest, whole, done)


@pytest.mark.parametrize("options", [{"num_iterations": 2}, {"steps_per_generation": 2}], ids=str)
def test_a_trainer_that_has_trained_on_goes_back_to_a_checkpoint(
    options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    settings = SAVING | options
    _, whole = train(PCRTrainer, PCRConfig, folder, tmp_path / "whole", max_steps=4, **settings)
    trainer, gradients = train(PCRTrainer, PCRConfig, folder, tmp_path / "again", max_steps=3, **settings)
    gradients.steps.clear()
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_goes_on(gradients, whole, 2)


def test_the_same_responses_in_other_micro_batches_go_on(folder: Path, tmp_path: Path) -> None:
    """From the start of a generation batch on; to rounding."""
    one = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    two = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    options = SAVING | {"rule": "grpo", "max_steps": 4}
    _, expected = train(PCRTrainer, PCRConfig, folder, tmp_path / "one", **options, **one)
    checkpoint = str(tmp_path / "one" / "checkpoint-2")
    _, got = train(PCRTrainer, PCRConfig, folder, tmp_path / "two", resume=checkpoint, **options, **two)
    assert len(got.steps) == 2
    assert relative_error(got.steps[0], expected.steps[2]) <= 1e-5
    assert relative_error(got.steps[1], expected.steps[3]) <= 1e-3  # Adam magnifies the first step's rounding


def test_what_would_not_go_on_as_it_was_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = SAVING | {"steps_per_generation": 2, "max_steps": 2}
    train(PCRTrainer, PCRConfig, folder, tmp_path, **settings)
    checkpoint = tmp_path / "checkpoint-1"
    within, between = {"resume": str(checkpoint)}, {"resume": str(tmp_path / "checkpoint-2")}
    half = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    for changes, message in (
        (within | {"steps_per_generation": 4}, "generation_batch_size: .* was written with 16"),
        (within | {"num_iterations": 2}, "num_iterations: .* was written with 1"),
        (within | half, "steps_per_generation: .* was written with 2"),
        (between | {"per_device_train_batch_size": 4}, "generation_batch_size: .* was written with 16"),
        (between | {"gradient_accumulation_steps": 2}, "responses of a step .* was written with 8"),
    ):
        with pytest.raises(ValueError, match=message):
            train(PCRTrainer, PCRConfig, folder, tmp_path, **(settings | changes))
    for name in ("rng_state.pth", "scheduler.pt", "optimizer.pt"):
        (checkpoint / name).rename(tmp_path / name)
        with pytest.raises(ValueError, match=f"checkpoint-1 has no {name[:9]}.*save_only_model"):
            train(PCRTrainer, PCRConfig, folder, tmp_path, resume=str(checkpoint), **settings)
        (tmp_path / name).rename(checkpoint / name)


def test_a_checkpoint_of_an_earlier_version_is_refused(folder: Path, tmp_path: Path) -> None:
    train(PCRTrainer, PCRConfig, folder, tmp_path, max_steps=1, **SAVING)
    file = tmp_path / "checkpoint-1" / "pcr_state.pt"
    torch.save(torch.load(file, weights_only=True)["method"], file)
    file.with_name("checksums.json").unlink()
    with pytest.raises(ValueError, match="written by an earlier version"):
        train(PCRTrainer, PCRConfig, folder, tmp_path, resume=str(file.parent), max_steps=2)
