"""The benchmark commands run; what they measure is not looked at here."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.gpu import isolated
from benchmarks.gpu.context import Context
from benchmarks.gpu.tables import Table

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL_STEP = ("grpo_step.py", "--responses", "4", "--tokens", "4", "--vocabulary", "64", "--repeats", "1")
SMALL_JAX = (*SMALL_STEP, "--layers", "1", "--hidden", "128", "--mlp", "96", "--groups-at-once", "1", "--only", "upper")


@pytest.mark.parametrize(
    ("command", "ways"),
    [
        ((*SMALL_STEP, "--only", "PCR", "two"), 4),
        ((*SMALL_STEP, "--amortised"), 3),
        (("resolve.py", "--size", "200000", "--repeats", "1"), 4),
        (("decide.py", "--repeats", "1"), 4),
    ],
    ids=["step", "amortised", "resolve", "decide"],
)
def test_benchmarks_run(
    command: tuple[str, ...],
    ways: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "rows.json"
    run_here(monkeypatch, *command, "--json", str(out))
    check(out, capsys.readouterr().out, ways)


@pytest.mark.parametrize(
    ("command", "ways"),
    [
        (SMALL_JAX, 2),
        (("resolve.py", "--size", "200000", "--repeats", "1"), 2),
    ],
    ids=["step", "resolve"],
)
def test_benchmarks_of_jax_run(command: tuple[str, ...], ways: int, tmp_path: Path) -> None:
    """In a process of its own: they tell glibc and JAX how to work before anything else."""
    out = tmp_path / "rows.json"
    words = [sys.executable, str(FOLDER / command[0]), *command[1:], "--framework", "jax", "--json", str(out)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(out, done.stdout, ways)


def check(out: Path, printed: str, ways: int) -> None:
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) >= ways
    assert rows[0]["ratio"] == 1.0
    assert all(row["seconds"] > 0 for row in rows)
    assert "| way | seconds |" in printed


def test_host_time_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(monkeypatch, "host_time.py", "--rounds", "1")
    assert "| PCR with noise |" in capsys.readouterr().out


def test_shared_noise_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(monkeypatch, "shared_noise.py", "--policies", "2", "--draws", "1000")
    assert capsys.readouterr().out.count("(") == 12


def run_here(monkeypatch: pytest.MonkeyPatch, script: str, *options: str) -> None:
    """As `python benchmarks/script options`, in this process, which has imported the libraries."""
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.syspath_prepend(FOLDER)
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)


GPU_PARTS = ("updates-right", "kernels-right", "updates", "counts", "resolving", "products")


def tables_of_a_device(*options: str, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "gpu.md").read_text().splitlines()[2:] != []
    parts: dict[str, Any] = json.loads((out / "gpu.json").read_text())["parts"]
    return parts


def test_the_tables_of_a_device_run_at_toy_sizes(tmp_path: Path) -> None:
    parts = tables_of_a_device("--parts", *GPU_PARTS, out=tmp_path)
    for part in GPU_PARTS:
        assert not parts[part]["said"], part
        assert all(table["rows"] and not table["wrong"] for table in parts[part]["tables"]), part
    (right,) = parts["updates-right"]["tables"]
    assert {row[0] for row in right["rows"]} >= {"Llama", "Llama, tied", "Qwen2", "GPT-2", "Mixtral"}
    assert all(row[-1] for row in right["rows"])
    assert len(parts["updates"]["tables"][0]["rows"]) == 7


def test_a_part_of_a_device_without_time_is_said_to_be_left_out(tmp_path: Path) -> None:
    parts = tables_of_a_device("--parts", "products", "--budget-seconds", "0", out=tmp_path)
    assert parts["products"]["said"].startswith("cut")
    assert parts["machine"]["tables"]


@pytest.mark.slow
def test_the_laws_of_a_device_run_at_toy_sizes(tmp_path: Path) -> None:
    (laws,) = tables_of_a_device("--parts", "laws", out=tmp_path)["laws"]["tables"]
    assert {row[0]: row[-1] for row in laws["rows"]}["torch"]


def test_a_part_that_fails_or_hangs_keeps_what_it_has_found() -> None:
    def broken(_: Context) -> Iterator[Table]:
        yield Table("found", ["what"], [["this"]])
        raise ValueError("broken")

    def hanging(_: Context) -> Iterator[Table]:
        yield Table("found", ["what"], [["this"]])
        time.sleep(60)

    now = time.monotonic()
    for part, said, failed in ((broken, "ValueError: broken", True), (hanging, "its time was up", False)):
        tables, why, wrong = isolated.run(part, Context("cpu", True, 0, now, now - 10))
        assert [table.rows for table in tables] == [[["this"]]]
        assert said in why
        assert wrong is failed


@pytest.mark.slow
def test_the_share_of_a_whole_step_runs() -> None:
    small = ("--model", "tiny", "--steps", "4", "--rounds", "1")
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
