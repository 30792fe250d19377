"""The TensorBoard files of pcr-train hold what metrics.jsonl holds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pcr_train.progress import read_metrics
from pcr_train.run import Outcome, train
from pcr_train.settings import Settings
from pcr_train.tensorboard import scalars


def test_a_missing_package_is_told_before_a_model_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"--tensorboard needs tensorboardX .*pip install 'pcr-grpo\[tensorboard\]'"):
        train(Settings(model="no-such-model"), tmp_path / "run", console=Console(quiet=True), tensorboard=True)
    assert not (tmp_path / "run" / "settings.json").exists()


def test_what_is_no_finite_number_is_left_out():
    row = {"step": 3, "reward": 1, "kl": None, "loss": float("nan"), "path": "fast", "blocks": {"b": [1.0]}}
    assert scalars(row) == {"train/reward": 1.0}


def test_files_follow_the_metrics_through_a_resumption(go: Callable[..., Outcome], tmp_path: Path):
    pytest.importorskip("tensorboardX", reason="needs the extra pcr-grpo[tensorboard]")
    from events import curves

    run = tmp_path / "run"
    go(run, steps=2, tensorboard=True, save_every=1)
    (run / "tensorboard" / "notes.txt").touch()
    assert [step for step, _ in curves(run)["train/reward"]] == [1, 2]
    rows = read_metrics(go(run, steps=3, resume=True).metrics)  # it has such files, so it goes on with them
    for tag, key in (("train/reward", "reward"), ("train/pcr/conflict_rate", "pcr/conflict_rate"), ("train/kl", "kl")):
        read = curves(run)[tag]
        assert [step for step, _ in read] == [1, 2, 3]
        assert [value for _, value in read] == pytest.approx([row[key] for row in rows])
    assert (run / "tensorboard" / "notes.txt").exists()


def test_files_of_a_run_that_was_started_without_them_have_all_its_steps(go: Callable[..., Outcome], tmp_path: Path):
    pytest.importorskip("tensorboardX", reason="needs the extra pcr-grpo[tensorboard]")
    from events import curves

    go(tmp_path / "run", steps=1)
    assert not (tmp_path / "run" / "tensorboard").exists()
    go(tmp_path / "run", steps=2, resume=True, tensorboard=True)
    assert [step for step, _ in curves(tmp_path / "run")["train/pcr/alpha"]] == [1, 2]
