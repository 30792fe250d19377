"""One run from settings to results: evaluate, train with checkpoints, evaluate again, plot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pcr_train import plots
from pcr_train.engine import Engine, Policy, load_engine, response_limit
from pcr_train.evaluate import Evaluation, Exam
from pcr_train.meter import Meter, measure
from pcr_train.progress import MetricsFile, StepLine, read_metrics
from pcr_train.settings import Settings, replace_text
from pcr_train.tasks import Problem, Task, load_task

RETENTION_POOL = 48
_WRITTEN = ("start", "checkpoint-*", "*.json", "metrics.jsonl", "plot.png", "README.md")
_LOCK = ".pcr-train.lock"
_CLAIMED = ".pcr-train"  # marks a folder in which a run is being prepared, until it has its settings.json


class Interrupted(Exception):
    """The run was stopped by Ctrl-C after a checkpoint was saved; `step` is the last one taken."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass(frozen=True)
class Outcome:
    """Where the results lie, the two evaluations, and the conflict that was measured between them."""

    folder: Path
    plot: Path
    metrics: Path
    model: Path
    before: Evaluation
    after: Evaluation
    retention_task: str
    meter: Meter
    seconds: float


def train(
    settings: Settings, folder: Path, *, resume: bool = False, console: Console | None = None, plot: bool = True
) -> Outcome:
    """Runs or resumes training in `folder`; without `plot`, no picture is drawn.

    Raises:
        ValueError: bad settings, a folder that is in use or cannot be written, or nothing to resume.
        ImportError: the framework is not installed.
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    if resume and not (folder / "settings.json").exists():
        raise ValueError(f"--resume: {folder} holds no settings.json, so no run of pcr-train was started there")
    with _alone_in(folder):
        return _train(settings, folder, resume=resume, console=console or Console(), plot=plot)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """A lock that the system holds for this process, and takes back when it ends, however that comes about."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a+")
    except OSError as error:
        raise ValueError(f"--out: {folder} cannot be written: {error.strerror}") from error
    with file:
        try:
            _lock(file)
        except OSError:
            file.seek(0)
            raise ValueError(
                f"{folder}: another run is going on in this folder (process {file.read().strip() or 'unknown'}); wait "
                "for its end, or give another --out"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _lock(file: Any) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _train(settings: Settings, folder: Path, *, resume: bool, console: Console, plot: bool) -> Outcome:
    started = time.perf_counter()
    kind = load_engine(settings.framework)
    kind.check(settings)
    checkpoint = _claim(settings, folder, resume, kind, console)
    task = load_task(
        settings.task, settings.task_options, seed=settings.seed, shots=settings.shots, style=settings.style
    )
    other = _other_task(settings)
    metrics = MetricsFile(folder / "metrics.jsonl")
    with console.status("preparing the model"):
        engine = kind(settings, task, folder)
        exam = _exam(settings, task, other, engine.tokenizer)
        engine.prepare(exam.problems)
    settings.save(folder / "settings.json")
    (folder / _CLAIMED).unlink(missing_ok=True)
    with console.status("measuring the model before training"):
        before, known = _before(exam, engine, folder / "before.json", resume)
    metrics.truncate(_step_of(checkpoint))
    with (
        StepLine(console, total=settings.steps, done=_step_of(checkpoint)) as line,
        _graceful_interrupt(console) as interrupt,
    ):

        def on_step(row: dict[str, Any]) -> None:
            metrics.write(row)
            line.show(row)

        last = engine.train(checkpoint, on_step, lambda: interrupt.asked)
    if interrupt.asked and last < settings.steps:
        raise Interrupted(last)

    with console.status("measuring the model after training"):
        after = exam.measure(engine, known)
    replace_text(folder / "after.json", json.dumps(after.to_json()) + "\n")
    rows = read_metrics(metrics.path)
    picture = folder / "plot.png"
    if plot:
        plots.draw(rows, picture, title=_title(settings))
    saved = last_checkpoint(folder, kind)
    assert saved is not None  # the last step is always saved
    seconds = time.perf_counter() - started
    return Outcome(
        folder, picture, metrics.path, saved, before, after, other.name if other else "", measure(rows), seconds
    )


def last_checkpoint(folder: Path, kind: type[Engine]) -> Path | None:
    """The newest complete checkpoint of a run: a kill may have left a half-written one."""
    return max(filter(kind.is_complete, _checkpoints(folder)), key=_step_of, default=None)


def _checkpoints(folder: Path) -> list[Path]:
    """ValueError for what is only named like one: the trainer deletes all but the newest of `checkpoint-*`."""
    found = list(folder.glob("checkpoint-*"))
    for path in found:
        if not path.name.removeprefix("checkpoint-").isdigit():
            raise ValueError(
                f"{path} is no checkpoint of this run, and its name would have the trainer delete it as an old one; "
                "rename it or move it away"
            )
    return found


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])


def _claim(settings: Settings, folder: Path, resume: bool, kind: type[Engine], console: Console) -> Path | None:
    """Checks that `folder` fits the request, and finds the checkpoint to resume."""
    file = folder / "settings.json"
    if resume:
        different = Settings.load(file).differences(settings)
        if different:
            raise ValueError(
                f"--resume: {', '.join('--' + name.replace('_', '-') for name in different)} differs from the run in "
                f"{folder}; leave it out to continue that run, or start a new one with another --out"
            )
        _set_aside_damaged(folder, kind, console)
        checkpoint = last_checkpoint(folder, kind)  # none: it stopped before the first, so it starts again
        if settings.steps < _step_of(checkpoint):
            raise ValueError(f"--steps: {settings.steps} is less than the {_step_of(checkpoint)} steps already taken")
    else:
        if file.exists():
            raise ValueError(f"--out: {folder} already holds a run; continue it with --resume {folder}")
        claimed = folder / _CLAIMED
        foreign = [] if claimed.exists() else [name for pattern in _WRITTEN for name in folder.glob(pattern)]
        if foreign:
            raise ValueError(
                f"--out: {foreign[0]} is not a run's, which would overwrite or delete it; name another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        claimed.touch()
        shutil.rmtree(folder / "start", ignore_errors=True)
        checkpoint = None
    return checkpoint


def _set_aside_damaged(folder: Path, kind: type[Engine], console: Console) -> None:
    """Checkpoints that were written whole and are not any more: kept under another name, and told."""
    for checkpoint in filter(kind.is_complete, _checkpoints(folder)):
        file = kind.damaged(checkpoint)
        if file is not None:
            kept = folder / f"damaged-{checkpoint.name}"
            checkpoint.rename(kept)
            before = last_checkpoint(folder, kind)
            where = "from the start: there is no other checkpoint" if before is None else f"after {before.name}"
            console.print(f"{file} is damaged; it is kept in {kept}, and the run goes on {where}", highlight=False)


def _other_task(settings: Settings) -> Task | None:
    name = settings.retention_task
    if name == settings.task:
        name = "chain_sum" if settings.task != "chain_sum" else "products"
    try:
        return None if name == "none" else load_task(name, seed=settings.seed, shots=settings.shots)
    except ValueError as error:
        raise ValueError(f"--retention-task {name}: {error}") from error


def _exam(settings: Settings, task: Task, other: Task | None, tokenizer: Any) -> Exam:
    return Exam(
        task=task,
        problems=task.heldout(settings.heldout),
        other=other,
        pool=other.heldout(RETENTION_POOL) if other else [],
        samples=settings.samples,
        temperature=settings.temperature,
        max_tokens=(response_limit(settings, task, tokenizer), response_limit(settings, other or task, tokenizer)),
        seed=settings.seed,
    )


def _before(exam: Exam, policy: Policy, file: Path, resume: bool) -> tuple[Evaluation, list[Problem]]:
    """The starting model's measurements and its retention set; kept in `file` for a resumed run."""
    if resume and file.exists():
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{file} is damaged ({error}); delete it, and the starting model is measured again"
            ) from error
        questions = set(values.pop("known"))
        return Evaluation(**values), [p for p in exam.pool if p.question in questions]
    known = exam.known(policy)
    before = exam.measure(policy, known)
    values = {**before.to_json(), "known": [p.question for p in known]}
    replace_text(file, json.dumps(values) + "\n")
    return before, known


@dataclass
class _Interrupt:
    """Whether Ctrl-C asked to end training, with a checkpoint, after the step that is being taken."""

    asked: bool = False


@contextmanager
def _graceful_interrupt(console: Console) -> Iterator[_Interrupt]:
    stop = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.asked:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        stop.asked = True
        console.print("Ctrl-C: finishing this step and saving; press it again to stop at once")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def _title(settings: Settings) -> str:
    name = os.path.basename(settings.model.rstrip("/")) or settings.model
    name += "" if settings.framework == "torch" else f" in {settings.framework}"
    return (
        f"{name} on {settings.task}, rule {settings.rule}, beta {settings.beta:g}, "
        f"learning rate {settings.learning_rate:g}, seed {settings.seed}"
    )
