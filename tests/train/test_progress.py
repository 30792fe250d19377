from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from pcr_train.progress import MetricsFile, StepLine, live, read_metrics


def test_numbers_that_are_not_finite_become_null_and_are_named(tmp_path: Path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "kl": math.nan, "reward": 0.5, "blocks": {"alpha": [0.5, math.inf]}})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in line
    assert "Infinity" not in line
    row = json.loads(line)
    assert (row["kl"], row["reward"], row["blocks"]["alpha"]) == (None, 0.5, [0.5, None])
    assert row["nonfinite"] == ["kl", "blocks.alpha"]


def test_a_line_cut_off_at_the_end_is_left_out_and_one_inside_is_an_error(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is damaged"):
        read_metrics(path)


def test_truncate_drops_the_steps_that_will_be_taken_again(tmp_path: Path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        file.write({"step": step})
    file.truncate(3)
    assert [row["step"] for row in read_metrics(file.path)] == [1, 2, 3]


def test_live_line_shows_reward_kl_conflict_and_alpha():
    text = live({"reward": 0.5, "kl": 0.01, "pcr/conflict_rate": 0.25, "pcr/alpha": 0.9})
    assert text == "reward 0.50  KL 0.0100  conflict 25%  alpha 0.900"
    assert "reward -" in live({})


def test_a_slow_path_is_told_once():
    out = io.StringIO()
    with StepLine(Console(file=out, width=200), total=3, done=0) as line:
        for step, path in enumerate(["autograd", "loop", "autograd", "loop"], 1):
            line.show({"step": step, "path": path})
    assert out.getvalue().count("a backward pass a response") == 1
    assert "step 2: the noise" in out.getvalue()
