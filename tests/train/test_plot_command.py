"""`pcr-train plot`: from files of metrics alone, one run or several in one picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_plots import row

from pcr_train import command, comparison
from pcr_train.comparison import labels, read_run
from pcr_train.settings import Settings


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pcr-train", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    return int(stop.value.code or 0)


def write(folder: Path, steps: int = 3, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row(step)) + "\n" for step in range(1, steps + 1)))
    Settings(**settings).save(folder / "settings.json")
    return folder


def test_one_run_is_drawn_again_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    run = write(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # it is going on
    assert call(monkeypatch, "plot", run) == 0
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert str(run / "plot.png") in capsys.readouterr().out


def test_several_runs_are_named_by_what_sets_them_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = [write(tmp_path / "a", rule="grpo", beta=0.02), write(tmp_path / "b", steps=5, beta=0.01)]
    assert call(monkeypatch, "plot", *runs, "--out", tmp_path / "both.svg") == 0
    text = (tmp_path / "both.svg").read_text()
    for name in ("rule grpo, beta 0.02", "rule pcr, beta 0.01"):
        assert text.count(f"<!-- {name} -->") == 2  # its line in the legend, and its cosines
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "plot", *runs) == 0
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_runs_with_the_same_settings_or_none_are_named_by_their_place(tmp_path: Path):
    same = [read_run(write(tmp_path / name)) for name in ("a", "b")]
    assert labels(same) == ["a", "b"]
    (tmp_path / "b" / "settings.json").unlink()
    assert labels([read_run(tmp_path / "a"), read_run(tmp_path / "b" / "metrics.jsonl")]) == ["a", "b"]
    twin = read_run(write(tmp_path / "other" / "a"))
    assert labels([same[0], twin]) == [str(same[0].file), str(twin.file)]


def test_runs_without_blocks_have_no_cosines(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "kl": null}\n')
    runs = [read_run(tmp_path / name) for name in ("a", "b")]
    assert comparison.draw_runs(runs, tmp_path / "both.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot"], "RUN"),
        (["plot", "missing"], "plot: missing does not exist"),
        (["plot", "empty"], "holds no metrics.jsonl"),
        (["plot", "new"], "holds no step yet"),
        (["plot", "other.json"], "is no metrics.jsonl of pcr-train"),
        (["plot", "run", "--out", "run.txt"], "--out: expected a file that ends with .png, .svg or .pdf"),
        (["plot", "run", "--out", "no-such-folder/run.png"], "No such file or directory"),
        (["--steps", "3", "plot", "run"], "--steps is an option of training"),
        (["plott", "run"], "No such command 'plott'"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    write(tmp_path / "run")
    for name in ("empty", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "new" / "metrics.jsonl").touch()
    (tmp_path / "other.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_teaches_by_examples(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    assert call(monkeypatch, "plot", "--help") == 0
    text = capsys.readouterr().out
    for word in ("{RUN}...", "--out", "pcr-train plot runs/tiny-*", "metrics.jsonl", "going on"):
        assert word in text
    assert call(monkeypatch, "--help") == 0
    assert "pcr-train plot RUN..." in capsys.readouterr().out
