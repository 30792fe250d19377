"""Runs the jobs of a stage that are not on record yet; several processes on one machine may share them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.learning.experiment import Experiment, Job, Row, Stage
from benchmarks.learning.frozen import (
    check_confirmation_may_go_on,
    check_selection_may_run,
    freeze,
    frozen_path,
    read_frozen,
)
from benchmarks.learning.record import append_environment, append_row, digest, read_rows

_CLAIM = "process"
_PATIENCE = 2.0  # seconds


def run_selection(experiment: Experiment, folder: Path, scratch: Path, console: Console) -> None:
    """Raises OutOfOrder once choices are frozen."""
    check_selection_may_run(experiment, folder)
    _run(experiment, "selection", experiment.jobs(experiment.selection_seeds, None), folder, scratch, console)


def run_confirmation(experiment: Experiment, folder: Path, scratch: Path, console: Console) -> None:
    """Raises OutOfOrder unless choices are frozen, and the ones that earlier lines were run with."""
    choices = read_frozen(experiment, folder)
    check_confirmation_may_go_on(experiment, folder)
    jobs = experiment.jobs(experiment.confirmation_seeds, choices)
    _run(experiment, "confirmation", jobs, folder, scratch, console, frozen=digest(frozen_path(folder)))


def run_all(experiment: Experiment, folder: Path, scratch: Path, console: Console) -> None:
    """What is left of selection, the freezing, and confirmation."""
    if not frozen_path(folder).exists():
        run_selection(experiment, folder, scratch, console)
        if not frozen_path(folder).exists():  # by a process that shared the jobs
            freeze(experiment, folder)
        console.print(f"{experiment.name}: choices frozen in {frozen_path(folder)}")
    run_confirmation(experiment, folder, scratch, console)


def _run(
    experiment: Experiment,
    stage: Stage,
    jobs: Sequence[Job],
    folder: Path,
    scratch: Path,
    console: Console,
    **environment: Any,
) -> None:
    path = folder / f"{stage}.jsonl"
    keys = [job.key for job in jobs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{experiment.name}: two jobs of {stage} have the same settings")
    left = _left(jobs, path)
    if not left:
        return
    append_environment(path, seeds=list(experiment.seeds(stage)), **environment)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(stage, total=len(jobs))
        while left:
            progress.update(task, completed=len(jobs) - len(left))
            taken = next((job for job in left if _claim(_place(job, scratch, experiment, stage))), None)
            if taken is None:
                progress.update(task, description=f"{experiment.name}, {stage}: waiting for other processes")
                time.sleep(_PATIENCE)
            else:
                label = " ".join(str(value) for value in taken.settings.values())
                progress.update(task, description=f"{experiment.name}, {stage}: {label}")
                _work(taken, _place(taken, scratch, experiment, stage), path)
            left = _left(jobs, path)
        progress.update(task, completed=len(jobs))


def _left(jobs: Sequence[Job], path: Path) -> list[Job]:
    done = {row.key for row in read_rows(path)}
    return [job for job in jobs if job.key not in done]


def _place(job: Job, scratch: Path, experiment: Experiment, stage: Stage) -> Path:
    return scratch / experiment.name / stage / hashlib.sha256(job.key.encode()).hexdigest()[:16]


def _claim(place: Path) -> bool:
    """Whether the job is this process's now: nobody had it, or who had it is dead."""
    place.mkdir(parents=True, exist_ok=True)
    try:
        claim = (place / _CLAIM).open("x", encoding="utf-8")
    except FileExistsError:
        try:
            os.kill(int((place / _CLAIM).read_text(encoding="utf-8")), 0)
        except ProcessLookupError:
            (place / _CLAIM).unlink(missing_ok=True)
            return _claim(place)
        except (OSError, ValueError):  # somebody else's process, or one that has this moment come or gone
            pass
        return False
    with claim:
        claim.write(str(os.getpid()))
    return True


def _work(job: Job, place: Path, record: Path) -> None:
    try:
        if _left([job], record):  # else another process finished it between the look and the claim
            (place / "settings.json").write_text(json.dumps(dict(job.settings), indent=1), encoding="utf-8")
            append_row(record, Row(job.settings, dict(job.run(place))))
    except BaseException:
        (place / _CLAIM).unlink()
        raise
    shutil.rmtree(place)
