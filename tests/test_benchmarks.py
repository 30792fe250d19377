"""The benchmark commands run; what they measure is not looked at here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL_STEP = ("grpo_step.py", "--responses", "4", "--tokens", "4", "--vocabulary", "64", "--repeats", "1")


@pytest.mark.parametrize(
    ("command", "ways"),
    [
        ((*SMALL_STEP, "--only", "PCR", "two"), 4),
        ((*SMALL_STEP, "--amortised"), 3),
        (("resolve.py", "--size", "200000", "--repeats", "1"), 4),
        (("decide.py", "--repeats", "1"), 4),
        ((*SMALL_STEP, "--framework", "jax", "--groups-at-once", "1", "--only", "upper"), 2),
        (("resolve.py", "--framework", "jax", "--size", "200000", "--repeats", "1"), 2),
    ],
    ids=["step", "amortised", "resolve", "decide", "step in jax", "resolve in jax"],
)
def test_benchmarks_run(command: tuple[str, ...], ways: int, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, str(FOLDER / command[0]), *command[1:], "--json", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) >= ways
    assert rows[0]["ratio"] == 1.0
    assert all(row["seconds"] > 0 for row in rows)
    assert "| way | seconds |" in done.stdout


def test_shared_noise_runs() -> None:
    command = [sys.executable, str(FOLDER / "shared_noise.py"), "--policies", "2", "--draws", "1000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(") == 12


def test_the_tables_of_a_device_run_at_toy_sizes(tmp_path: Path) -> None:
    parts = ("--toy", "--out", str(tmp_path), "--parts", "correctness", "updates", "products", "resolving")
    command = [sys.executable, "-m", "benchmarks.gpu", *parts]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    tables = json.loads((tmp_path / "gpu.json").read_text())
    assert all(row["right"] for row in tables["correctness"])
    assert {"vanilla", "PCR without noise", "PCR with noise"} <= {row["way"] for row in tables["updates"]}
    assert "## weight products" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_the_share_of_a_whole_step_runs() -> None:
    small = ("--model", "tiny", "--steps", "1", "--rounds", "1", "--clock", "process")
    done = subprocess.run([sys.executable, str(FOLDER / "trl_step.py"), *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| 1.00 |") >= 2
    assert "computed" in done.stdout


@pytest.mark.slow
def test_stacked_cotangents_runs() -> None:
    pytest.importorskip("jax")
    small = ("--width", "8", "--hidden", "12", "--responses", "4", "--tokens", "4")
    command = [sys.executable, str(FOLDER / "jax_stacked_cotangents.py"), *small]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right" in done.stdout
