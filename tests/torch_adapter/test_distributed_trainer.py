"""PCRTrainer on two processes: the plain sum reproduces TRL's trainer, and training resumes from checkpoints."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
import trainer_cases
from trl_runs import relative_error, save_model
from worlds import run_world

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS = ("accumulating", "straddling", "lora")
CASES = [(sharding, setting) for sharding in ("ddp", "fsdp") for setting in SETTINGS] + [("fsdp", "bfloat16")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Results of all cases by rank: one start of two processes for the file."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    return run_world(
        trainer_cases.run_cases, tmp_path_factory.mktemp("world"), folder, tmp_path_factory.mktemp("out"), timeout=150,
        libraries=("trl.trainer.grpo_trainer", "peft"),
    )  # fmt: skip


@pytest.mark.parametrize(("sharding", "setting"), CASES)
def test_plain_sum_reproduces_stock_grpo(sharding: str, setting: str, ranks: list[Any]) -> None:
    for results in ranks:
        got, expected = (results[f"{sharding}, {setting}"][key] for key in ("got", "expected"))
        assert got["sharded"] == expected["sharded"] == (sharding == "fsdp")
        tolerance = 2e-2 if setting == "bfloat16" else 1e-6
        assert len(got["gradients"]) == len(expected["gradients"]) == 2
        for mine, theirs in zip(got["gradients"], expected["gradients"], strict=True):
            assert relative_error(mine, theirs) <= tolerance
        assert relative_error(got["parameters"], expected["parameters"]) <= tolerance
        assert got["log"][-2]["pcr/stability_norm"] > 0.001 * got["log"][-2]["pcr/plasticity_norm"]
        for key in ("loss", "kl", "grad_norm"):
            assert got["log"][-2][key] == pytest.approx(expected["log"][-2][key], rel=10 * tolerance, abs=1e-6)


def test_a_group_keeps_its_number_on_every_rank(ranks: list[Any]) -> None:
    first, second = (results["ddp, straddling"]["got"]["groups"] for results in ranks)
    assert first == [0, 0, 0, 0, 1, 1]
    assert second == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_resumed_training_equals_uninterrupted(sharding: str, ranks: list[Any]) -> None:
    for results in ranks:
        case = results[f"{sharding}, resumed"]
        assert len(case["got"]["gradients"]) == 1
        assert relative_error(case["got"]["gradients"][0], case["expected"]["gradients"][2]) <= 1e-6
        assert relative_error(case["got"]["parameters"], case["expected"]["parameters"]) <= 1e-6
        shapes = {name: tuple(p.shape) for name, p in case["got"]["parameters"].items()}
        assert case["saved"] == {name: ("Tensor", shapes[name]) for name in case["saved"]}
        assert len(case["saved"]) == 6
        assert case["digests"] == {"weights": len(shapes), "reference": len(shapes)}
        assert "1 of 21 weights are not those that were saved" in case["refused"]


def test_ranks_agree(ranks: list[Any]) -> None:
    """On the statistics bit for bit, in every setting, so the logged metrics are those of all ranks."""
    for name in ranks[0]:
        one, other = (results[name]["got"]["statistics"] for results in ranks)
        for mine, theirs in ((getattr(one, f.name), getattr(other, f.name)) for f in fields(one)):
            assert (mine is theirs is None) or torch.equal(mine, theirs), name  # noise is not measured in every step
