"""PCRTrainer against stock GRPOTrainer: the same gradients under the plain sum, its metrics, LoRA, `every`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as stock
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl_runs import GROUP, relative_error, train

import pcr_core
from pcr_torch import PCR
from pcr_torch.trl import PCRConfig, PCRTrainer
from pcr_torch.trl.groups import shuffle_groups

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_sum_rule_reproduces_stock_grpo(
    loss_type: str, accumulation: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_groups(batch: dict[str, Any]) -> dict[str, Any]:
        return shuffle_groups(batch, torch.arange(batch["completion_ids"].shape[0]) // GROUP)

    monkeypatch.setattr(stock, "shuffle_sequence_dict", by_groups)  # same micro-batches, for bnpo's local normaliser
    options = {
        "loss_type": loss_type,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "reference_noise": 0.3,
    }
    theirs, expected = train(GRPOTrainer, GRPOConfig, folder, tmp_path, **options)
    ours, got = train(PCRTrainer, PCRConfig, folder, tmp_path, rule="grpo", **options)
    assert relative_error(got.steps[0], expected.steps[0]) <= 1e-6
    assert ours.last_report.metrics()["pcr/stability_norm"] > 0.01 * ours.last_report.metrics()["pcr/plasticity_norm"]
    same = ("loss", "kl", "reward", "entropy", "clip_ratio/region_mean", "completions/mean_length")
    for key in same:
        assert ours.state.log_history[0][key] == pytest.approx(theirs.state.log_history[0][key], rel=1e-5)


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "luspo", "vespo"])
def test_other_losses_of_trl_separate_too(
    loss_type: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)
    options = {"loss_type": loss_type, "max_steps": 1, "reference_noise": 0.3}
    if loss_type == "cispo":
        options["epsilon_high"] = 5.0
    if loss_type == "luspo":
        options["importance_sampling_level"] = "sequence"
    _, expected = train(GRPOTrainer, GRPOConfig, folder, tmp_path, **options)
    _, got = train(PCRTrainer, PCRConfig, folder, tmp_path, rule="grpo", **options)
    assert relative_error(got.steps[0], expected.steps[0]) <= 1e-6


def test_several_iterations_and_the_loop_agree_with_stock(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off-policy steps (num_iterations 2): ratios differ from 1 and old log-probabilities are carried along."""
    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)
    options = {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2}
    _, expected = train(GRPOTrainer, GRPOConfig, folder, tmp_path, **options)
    for norms in ("fast", "loop"):
        _, got = train(PCRTrainer, PCRConfig, folder, tmp_path, rule="grpo", norms=norms, **options)
        assert relative_error(got.steps[0], expected.steps[0]) <= 1e-6
        assert relative_error(got.steps[1], expected.steps[1]) <= 1e-5  # Adam magnifies the first step's rounding


def test_importance_sampling_ratios_reach_the_loss(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an engine for generation gives them; vespo reads them without one."""
    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)
    options = {"loss_type": "vespo", "max_steps": 1, "reference_noise": 0.3}
    _, plain = train(GRPOTrainer, GRPOConfig, folder, tmp_path, **options)
    generate = GRPOTrainer._generate_and_score_completions

    def with_ratios(self: Any, inputs: Any) -> Any:
        output = generate(self, inputs)
        shape = output["completion_ids"].shape
        output["importance_sampling_ratio"] = torch.linspace(0.5, 1.5, shape[0])[:, None].expand(shape)
        return output

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", with_ratios)
    _, expected = train(GRPOTrainer, GRPOConfig, folder, tmp_path, **options)
    _, got = train(PCRTrainer, PCRConfig, folder, tmp_path, rule="grpo", **options)
    assert relative_error(plain.steps[0], expected.steps[0]) > 1e-2
    assert relative_error(got.steps[0], expected.steps[0]) <= 1e-6


def test_metrics_and_report(folder: Path, tmp_path: Path) -> None:
    trainer, _ = train(PCRTrainer, PCRConfig, folder, tmp_path, alpha="snr", log_layers=True)
    logged = trainer.state.log_history[1]
    for name in (
        "conflict_rate",
        "conflict_rate_debiased",
        "noise_share",
        "cosine",
        "cosine_debiased",
        "alpha",
        "removed",
        "boost",
        "plasticity_norm",
        "stability_norm",
        "plasticity_nsr",
        "stability_nsr",
    ):
        assert math.isfinite(logged[f"pcr/{name}"])
        assert math.isfinite(logged[f"pcr/layer_01/{name}"])
    assert logged["kl"] > 0
    assert logged["pcr/stability_norm"] > 0
    report = trainer.last_report
    assert len(report.blocks) == 6
    assert logged["pcr/alpha"] == pytest.approx(float(report.weights.alpha.mean()))


def test_first_step_from_the_reference_has_no_stability_gradient(folder: Path, tmp_path: Path) -> None:
    trainer, _ = train(PCRTrainer, PCRConfig, folder, tmp_path, max_steps=1)
    first = trainer.state.log_history[0]
    assert first["pcr/stability_norm"] == pytest.approx(0.0, abs=1e-6)
    assert first["pcr/nonfinite_blocks"] == 0


def test_lora_through_the_trainer(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    trainer, gradients = train(
        PCRTrainer, PCRConfig, folder, tmp_path, peft_config=LoraConfig(r=2, target_modules=["up_proj", "q_proj"])
    )
    assert {block.family for block in trainer.last_report.blocks} == {"up_proj.lora_A", "up_proj.lora_B"}
    assert any("q_proj" in name for name in gradients.steps[1])


def test_evaluation_leaves_the_streams_alone(folder: Path, tmp_path: Path) -> None:
    trainer, _ = train(PCRTrainer, PCRConfig, folder, tmp_path, max_steps=1, num_generations_eval=2)
    before = trainer.last_report
    metrics = trainer.evaluate(Dataset.from_dict({"prompt": ["ab", "cd"]}))
    assert math.isfinite(metrics["eval_loss"])
    assert trainer.last_report is before


def test_amortised_steps_through_the_trainer_and_resumed_between(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    options: dict[str, Any] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "every": 3,
        "granularity": "global",
        "peft_config": LoraConfig(r=2, target_modules=["up_proj", "down_proj"]),
        "learning_rate": 0.05,
    }
    trainer, whole = train(PCRTrainer, PCRConfig, folder, tmp_path / "whole", **options)
    logged = [entry["pcr/measured"] for entry in trainer.state.log_history if "pcr/measured" in entry]
    assert logged == [1.0, 1.0, 0.0, 0.0]  # the first step starts from the reference, where S = 0
    _, rest = train(
        PCRTrainer, PCRConfig, folder, tmp_path / "rest", resume=str(tmp_path / "whole" / "checkpoint-2"), **options
    )
    assert all(torch.equal(rest.steps[k][name], whole.steps[2 + k][name]) for k in range(2) for name in whole.steps[2])


def test_shuffle_keeps_groups_together_and_rows_aligned() -> None:
    ids = torch.arange(12) // 3
    batch = {
        "x": torch.arange(12),
        "names": [str(i) for i in range(12)],
        "ids": ids,
        "none": None,
        "n": torch.tensor(4),
    }
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        out = shuffle_groups(batch, ids)
        assert out["names"] == [str(i) for i in out["x"].tolist()]
        assert torch.equal(out["ids"], out["x"] // 3)
        assert [len(set(part)) for part in out["ids"].reshape(4, 3).tolist()] == [1] * 4
        seen.add(tuple(out["ids"].tolist()))
    assert len(seen) > 5


class OffPolicy(PCRTrainer):
    """Responses that another policy has sampled."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        reference = output["ref_per_token_logps"]
        noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(2))
        return {**output, "old_per_token_logps": reference + 0.3 * noise}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("corrected", "kl"), [(None, "k3_ratio"), (True, "k3_ratio"), (False, "k3")])
def test_both_routes_have_the_same_streams(
    corrected: bool | None, kl: Any, level: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's KL is k3 times the ratio unless it is asked not to be, and `grpo_objective` has either."""
    given = []
    accumulate = PCR.accumulate_cotangents

    def recorded(self: PCR, logp: Tensor, plasticity: Tensor, stability: Tensor, **options: Any) -> None:
        given.append((logp.detach().clone(), plasticity.clone(), stability.clone()))
        accumulate(self, logp, plasticity, stability, **options)

    monkeypatch.setattr(PCR, "accumulate_cotangents", recorded)
    options: dict[str, Any] = {"loss_type": "grpo", "importance_sampling_level": level, "reference_noise": 0.3}
    if corrected is not None:
        options["use_bias_correction_kl"] = corrected
    trainer, _ = train(OffPolicy, PCRConfig, folder, tmp_path, max_steps=1, **options)
    ((logp, plasticity, stability),), batch = given, trainer._buffered_inputs[0]
    objective = pcr_core.grpo_objective(
        logp,
        batch["old_per_token_logps"],
        batch["ref_per_token_logps"],
        batch["advantages"],
        batch["completion_mask"],
        beta=0.1,
        importance=level,
        kl=kl,
    )
    for got, expected in ((objective.plasticity_cotangent, plasticity), (objective.stability_cotangent, stability)):
        assert (got - expected).norm() <= 1e-5 * expected.norm()
    logged = trainer.state.log_history[0]
    assert float(objective.kl) == pytest.approx(logged["kl"], rel=1e-5)
