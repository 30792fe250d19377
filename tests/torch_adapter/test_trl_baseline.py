"""PCRTrainer with a baseline: the losses are TRL's, of shifted advantages; checkpoints know b; bias is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_checkpoints import SAVING, assert_goes_on
from test_trl_config import config
from trl import GRPOConfig, GRPOTrainer
from trl_runs import relative_error, train

from pcr_torch import baseline
from pcr_torch.trl import PCRConfig, PCRTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
B = 0.4


@pytest.fixture
def shifted_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    made = baseline.Baseline.__init__

    def init(self: Any, *options: float) -> None:
        made(self, *options)
        self.load_state_dict({"sums": torch.tensor([10 * B, 10, 10, 10 * B**2, 10 * B, 10])})

    monkeypatch.setattr(baseline.Baseline, "__init__", init)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "luspo"])
@pytest.mark.usefixtures("shifted_from_the_start")
def test_the_gradient_is_the_stock_trainers_of_shifted_advantages(loss_type: str, folder: Path, tmp_path: Path) -> None:
    class Shifted(GRPOTrainer):  # type: ignore[misc]
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            weight = inputs["completion_mask"].sum(1) / 6 if loss_type == "grpo" else 1.0
            return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"] - B * weight})

    options: dict[str, Any] = {"loss_type": loss_type, "max_steps": 1, "reference_noise": 0.3}
    if loss_type == "luspo":
        options["importance_sampling_level"] = "sequence"
    _, plain = train(GRPOTrainer, GRPOConfig, folder, tmp_path, **options)
    _, expected = train(Shifted, GRPOConfig, folder, tmp_path, **options)
    ours, got = train(PCRTrainer, PCRConfig, folder, tmp_path, rule="grpo", baseline=1.0, noise_every=1, **options)
    assert relative_error(got.steps[0], expected.steps[0]) <= 1e-6
    assert relative_error(plain.steps[0], expected.steps[0]) > 0.01
    logged = ours.state.log_history[0]
    assert logged["pcr/baseline"] == pytest.approx(B)
    assert "pcr/baseline_reduction" in logged
    given = ours._buffered_inputs[0]["advantages"]  # as they were, for another iteration
    assert float(given.sum().abs()) < 1e-4


@pytest.mark.usefixtures("shifted_from_the_start")
def test_resumed_training_equals_uninterrupted(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = SAVING | {"max_steps": 4, "baseline": 0.5, "noise_every": 2, "temperature": 1.0}
    ours, whole = train(PCRTrainer, PCRConfig, folder, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    state = torch.load(checkpoint / "pcr_state.pt", weights_only=True)
    assert state["method"]["baseline"]["sums"].abs().sum() > 0
    again, rest = train(PCRTrainer, PCRConfig, folder, tmp_path / "rest", resume=str(checkpoint), **options)
    assert_goes_on(rest, whole, 2)
    shifts = [[row["pcr/baseline"] for row in t.state.log_history if "pcr/baseline" in row] for t in (ours, again)]
    assert shifts[0] == shifts[1]


@pytest.mark.parametrize(
    "options",
    [
        {"mask_truncated_completions": True},
        {"top_p": 0.9},
        {"top_k": 20},
        {"min_p": 0.1},
        {"off_policy_mask_threshold": 0.5},
        {"loss_type": "sapo"},
        {"loss_type": "vespo"},
    ],
    ids=str,
)
def test_what_would_be_biased_is_refused(options: dict[str, Any]) -> None:
    config(**options)
    with pytest.raises(ValueError, match=f"^baseline: .*{next(iter(options))}"):
        config(**options, baseline=0.5)


def test_without_measurements_it_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_every=0: the baseline"):
        config(noise_every=0, baseline=0.5)


def test_advantages_that_a_class_makes_within_its_loss_are_refused(folder: Path, tmp_path: Path) -> None:
    class Own(PCRTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            own = {**inputs, "advantages": torch.ones_like(inputs["advantages"]).detach()}
            return super().compute_loss(model, own, *args, **kwargs)

    with pytest.raises(ValueError, match="baseline: a class above puts advantages of its own"):
        train(Own, PCRConfig, folder, tmp_path, baseline=0.5, max_steps=1)


def test_rows_that_move_within_the_loss_are_refused(folder: Path, tmp_path: Path) -> None:
    class Moved(GRPOTrainer):  # type: ignore[misc]
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            order = torch.arange(inputs["advantages"].shape[0]).flip(0)
            moved = {k: v[order] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in inputs.items()}
            return super()._compute_loss(model, moved)

    cls = type("Both", (PCRTrainer, Moved), {})
    train(cls, PCRConfig, folder, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="baseline: rows were dropped, repeated, moved"):
        train(cls, PCRConfig, folder, tmp_path, baseline=0.5, max_steps=1)
