"""Runs the jobs of a stage that are not on record yet."""

from __future__ import annotations

import hashlib
import json
import shutil
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
        freeze(experiment, folder)
        console.print(f"{experiment.name}: choices frozen in {frozen_path(folder)}")
    run_confirmation(experiment, folder, scratch, console)


def _run(
    experiment: Experiment,
    stage: Stage,
    jobs: Any,
    folder: Path,
    scratch: Path,
    console: Console,
    **environment: Any,
) -> None:
    path = folder / f"{stage}.jsonl"
    keys = [job.key for job in jobs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{experiment.name}: two jobs of {stage} have the same settings")
    done = {row.key for row in read_rows(path)}
    left = [job for job in jobs if job.key not in done]
    if not left:
        return
    append_environment(path, seeds=list(experiment.seeds(stage)), **environment)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(stage, total=len(jobs), completed=len(jobs) - len(left))
        for job in left:
            label = " ".join(str(value) for value in job.settings.values())
            progress.update(task, description=f"{experiment.name}, {stage}: {label}")
            append_row(path, Row(job.settings, _work(job, scratch / experiment.name / stage)))
            progress.advance(task)


def _work(job: Job, scratch: Path) -> dict[str, Any]:
    place = scratch / hashlib.sha256(job.key.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    (place / "settings.json").write_text(json.dumps(dict(job.settings), indent=1), encoding="utf-8")
    values = dict(job.run(place))
    shutil.rmtree(place)
    return values
