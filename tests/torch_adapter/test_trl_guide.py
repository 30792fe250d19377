"""docs/trl.md against the trainer: its script runs, its tables name what is there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from pages import DOCS, run
from trl import GRPOConfig
from trl_runs import reward, save_model

from pcr_torch.trl import PCRConfig, PCRTrainer
from pcr_torch.trl.separability import SEPARABLE_LOSSES

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = DOCS / "trl.md"


def table(title: str) -> list[tuple[list[str], str]]:
    """Rows of the first table below a title: what the first cell names as code, and the second cell."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("|")][2:]
    return [(re.findall(r"`([^`]+)`", row[0]), row[1].strip()) for row in rows]


def test_the_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = {
        "model": str(save_model(tmp_path / "model")),
        "reward": reward,
        "dataset": Dataset.from_dict({"prompt": ["ab", "cde"]}),
    }
    here = 'output_dir="out", use_cpu=True, bf16=False,'
    trainer = run(PAGE, scope, lambda code: code.replace('output_dir="out",', here))["trainer"]
    assert trainer.state.global_step > 0
    logged = {key for keys, _ in table("What is logged") for key in keys}
    told = {key for key in trainer.state.log_history[0] if key.startswith("pcr/")}  # the first step measures the noise
    assert logged == told | {"pcr/measured", "pcr/baseline", "pcr/baseline_reduction"}
    assert {*trainer.last_report.metrics()} <= logged


def test_every_option_is_in_the_table() -> None:
    theirs = {f.name for f in fields(GRPOConfig)}
    defaults = {f.name: f.default for f in fields(PCRConfig) if f.name not in theirs}
    told = {}
    for names, values in table("Options"):
        told |= dict(zip(names, eval(f"({values.replace('`', '')},)"), strict=True))
    assert told == defaults


def test_every_loss_is_named() -> None:
    section = PAGE.read_text(encoding="utf-8").split("\n## Losses\n")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", section)) - {"loss_type", "router_aux_loss_coef"} == set(SEPARABLE_LOSSES)


@pytest.mark.parametrize("setting", [names[0] for names, _ in table("What is refused") if names and "=" in names[0]])
def test_what_the_table_calls_refused_is(setting: str, tmp_path: Path) -> None:
    options: dict[str, Any] = eval(f"dict({setting})")
    name = next(iter(options))
    config = {"output_dir": str(tmp_path), "beta": 0.1, "bf16": False, "use_cpu": True}
    if name in ("fp16", "deepspeed"):  # transformers itself needs a GPU, or DeepSpeed, to accept these
        args = PCRConfig(**config)
        setattr(args, name, options[name])
    elif name == "beta":
        with pytest.raises(ValueError, match=r"^beta"):
            PCRConfig(**config | options)
        return
    else:
        if name == "per_device_train_batch_size":  # TRL itself wants generation batches of whole groups
            config["generation_batch_size"] = 8
        args = PCRConfig(**config | options)
    with pytest.raises(ValueError, match=f"^{name}"):
        PCRTrainer(model=str(tmp_path), reward_funcs=reward, args=args)
