"""The order that experiments keep, their record, and their statistics."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.learning.experiment import Choices, Experiment, Job, Results, Row
from benchmarks.learning.frozen import OutOfOrder, freeze
from benchmarks.learning.paired import holm, paired_interval
from benchmarks.learning.parts import Claim, Report, Table
from benchmarks.learning.record import read_rows
from benchmarks.learning.report import replace_claims, write_report
from benchmarks.learning.run import run_all, run_confirmation, run_selection

QUIET = Console(quiet=True)


def jobs(seeds: tuple[int, ...], choices: Choices | None) -> list[Job]:
    rates = [1, 2] if choices is None else [choices["rate"]]
    return [Job({"rate": r, "seed": s}, lambda _, r=r, s=s: {"score": r + s / 10}) for r in rates for s in seeds]


def choose(rows: Sequence[Row]) -> Choices:
    return {"rate": max(rows, key=lambda row: row.values["score"]).settings["rate"]}


def report(results: Results) -> Report:
    scores = [row.values["score"] for row in results.confirmation]
    claim = Claim("score - 2", paired_interval(scores, [2.0] * len(scores)))
    return Report([Table("scores", ["score"], [[str(score)] for score in scores])], [claim])


TOY = Experiment("toy", "Which rate?", "A sum.", (0, 1), (5, 6, 7), jobs, choose, report)


def test_stages_in_order(tmp_path: Path):
    run_all(TOY, tmp_path, tmp_path / "scratch", QUIET)
    assert json.loads((tmp_path / "frozen.json").read_text())["choices"] == {"rate": 2}
    assert [row.settings["seed"] for row in read_rows(tmp_path / "confirmation.jsonl")] == [5, 6, 7]
    assert write_report(TOY, tmp_path) == []  # no headline
    page = (tmp_path / "report.md").read_text()
    assert "| score - 2 | +0.6000 [+0.3516, +0.8484] | 3 |" in page
    assert "seeds 5, 6, 7" in page


def test_confirmation_needs_frozen_choices(tmp_path: Path):
    run_selection(TOY, tmp_path, tmp_path / "scratch", QUIET)
    with pytest.raises(OutOfOrder, match="no choices are frozen"):
        run_confirmation(TOY, tmp_path, tmp_path / "scratch", QUIET)


def test_freezing_needs_all_of_selection(tmp_path: Path):
    run_selection(replace(TOY, selection_seeds=(0,)), tmp_path, tmp_path / "scratch", QUIET)
    with pytest.raises(OutOfOrder, match="2 jobs of selection are missing"):
        freeze(TOY, tmp_path)


def test_selection_does_not_run_after_freezing(tmp_path: Path):
    run_selection(TOY, tmp_path, tmp_path / "scratch", QUIET)
    freeze(TOY, tmp_path)
    with pytest.raises(OutOfOrder, match=r"delete frozen\.json"):
        run_selection(TOY, tmp_path, tmp_path / "scratch", QUIET)


def test_selection_does_not_run_once_confirmation_was_seen(tmp_path: Path):
    run_all(TOY, tmp_path, tmp_path / "scratch", QUIET)
    (tmp_path / "frozen.json").unlink()
    with pytest.raises(OutOfOrder, match="have been looked at"):
        run_all(TOY, tmp_path, tmp_path / "scratch", QUIET)


@pytest.mark.parametrize("tampered", ["selection.jsonl", "frozen.json", "seeds", "frozen anew"])
def test_tampering_is_noticed(tampered: str, tmp_path: Path):
    run_all(TOY, tmp_path, tmp_path / "scratch", QUIET)
    experiment = replace(TOY, confirmation_seeds=(5, 6, 8)) if tampered == "seeds" else TOY
    change = {"selection.jsonl": ("2.1", "2.2"), "frozen.json": ('"rate": 2', '"rate": 1'), "frozen anew": ("}", "}\n")}
    if tampered != "seeds":
        path = tmp_path / ("selection.jsonl" if tampered == "selection.jsonl" else "frozen.json")
        text = path.read_text()
        path.write_text(text.replace(*change[tampered]))
        assert path.read_text() != text
    with pytest.raises(OutOfOrder):
        run_confirmation(experiment, tmp_path, tmp_path / "scratch", QUIET)


def test_a_killed_run_goes_on(tmp_path: Path):
    ran: list[int] = []

    def once(seeds: tuple[int, ...], choices: Choices | None) -> list[Job]:
        def job(place: Path, seed: int) -> dict[str, float]:
            if seed == 1 and len(ran) < 2:
                (place / "half").touch()
                ran.append(seed)
                raise KeyboardInterrupt
            ran.append(seed)
            return {"score": 1.0, "found": float((place / "half").exists())}

        return [Job({"rate": 1, "seed": s}, lambda place, s=s: job(place, s)) for s in seeds]

    experiment = replace(TOY, jobs=once)
    with pytest.raises(KeyboardInterrupt):
        run_selection(experiment, tmp_path, tmp_path / "scratch", QUIET)
    path = tmp_path / "selection.jsonl"
    path.write_text(path.read_text() + '{"settings": {"rate"')  # killed while writing
    run_selection(experiment, tmp_path, tmp_path / "scratch", QUIET)
    assert ran == [0, 1, 1]
    assert [row.values["found"] for row in read_rows(path)] == [0.0, 1.0]


def test_two_processes_share_the_jobs(tmp_path: Path):
    """One is in its first job while the other comes, does the rest, and waits until the first has died."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ran: list[int] = []

    def logged(seeds: tuple[int, ...], choices: Choices | None) -> list[Job]:
        def job(seed: int) -> dict[str, float]:
            ran.append(seed)
            if len(ran) == len(seeds) - 1:
                other.kill()
                other.wait()
            return {"score": 1.0}

        return [Job({"rate": 1, "seed": s}, lambda _, s=s: job(s)) for s in seeds]

    experiment = replace(TOY, jobs=logged, selection_seeds=(0, 1, 2, 3))
    first = experiment.jobs((0,), None)[0]
    place = tmp_path / "scratch" / "toy" / "selection" / hashlib.sha256(first.key.encode()).hexdigest()[:16]
    place.mkdir(parents=True)
    (place / "process").write_text(str(other.pid))
    run_selection(experiment, tmp_path, tmp_path / "scratch", QUIET)
    assert ran == [1, 2, 3, 0]
    assert len(read_rows(tmp_path / "selection.jsonl")) == 4
    assert not any((tmp_path / "scratch" / "toy" / "selection").iterdir())


def test_seeds_are_apart():
    with pytest.raises(ValueError, match=r"seeds \[1\] are in selection and in confirmation"):
        replace(TOY, confirmation_seeds=(1, 2))


def test_holm_keeps_the_order_of_p_values():
    adjusted = holm([0.2, 0.001, 0.03, 0.04])
    assert adjusted == pytest.approx([0.2, 0.004, 0.09, 0.09])


def test_claims_replace_only_their_part():
    from benchmarks.learning.report import END, START

    page = replace_claims(f"before\n{START}\nold\n{END}\nafter", [Table("t", ["a"], [["1"]])])
    assert page.startswith("before\n")
    assert page.endswith("\nafter")
    assert "old" not in page
    assert "| 1 |" in page
