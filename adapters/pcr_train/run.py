"""One run from settings to results: evaluate, train with checkpoints, evaluate again, plot."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pcr_train import plots
from pcr_train.engine import Policy, load_engine, response_limit
from pcr_train.evaluate import Evaluation, Exam
from pcr_train.folder import PREPARING, alone_in, claim, last_checkpoint, reclaim, step_of, told_when_full
from pcr_train.meter import Meter, measure
from pcr_train.progress import MetricsFile, StepLine, read_metrics
from pcr_train.settings import Settings, replace_text, title
from pcr_train.tasks import Problem, Task, load_task
from pcr_train.tensorboard import FOLDER, TensorBoard, load_writer

RETENTION_POOL = 48


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
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    plot: bool = True,
    tensorboard: bool = False,
) -> Outcome:
    """Runs or resumes training in `folder`; without `plot`, no picture is drawn.

    With `tensorboard`, or where a resumed run has such files, the steps are written as TensorBoard files too.

    Raises:
        ValueError: bad settings, a folder that is in use or cannot be written, or nothing to resume.
        ImportError: the framework is not installed, or tensorboardX where it is needed.
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    if resume and not (folder / "settings.json").exists():
        raise ValueError(f"--resume: {folder} holds no settings.json, so no run of pcr-train was started there")
    option = "--resume" if resume else "--out"
    with alone_in(folder, option), told_when_full(folder, option):
        return _train(settings, folder, resume, console or Console(), plot, tensorboard)


def _train(settings: Settings, folder: Path, resume: bool, console: Console, plot: bool, tensorboard: bool) -> Outcome:
    started = time.perf_counter()
    if tensorboard:
        load_writer()  # what is missing is told before a model is made
    kind = load_engine(settings.framework)
    kind.check(settings)
    checkpoint = None
    if resume:
        checkpoint = reclaim(settings, folder, kind, console)
    else:
        claim(folder)
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
    (folder / PREPARING).unlink(missing_ok=True)
    with console.status("measuring the model before training"):
        before, known = _before(exam, engine, folder / "before.json", resume)
    metrics.truncate(step_of(checkpoint))
    board = None
    if tensorboard or (resume and (folder / FOLDER).exists()):
        board = TensorBoard(folder, settings, read_metrics(metrics.path))
    with (
        closing(board) if board else nullcontext(),
        StepLine(console, total=settings.steps, done=step_of(checkpoint)) as line,
        _graceful_interrupt(console) as interrupt,
    ):

        def on_step(row: dict[str, Any]) -> None:
            metrics.write(row)
            if board is not None:
                board.write(row)
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
        plots.draw(rows, picture, title=title(settings))
    saved = last_checkpoint(folder, kind)
    assert saved is not None  # the last step is always saved
    seconds = time.perf_counter() - started
    return Outcome(
        folder, picture, metrics.path, saved, before, after, other.name if other else "", measure(rows), seconds
    )


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
