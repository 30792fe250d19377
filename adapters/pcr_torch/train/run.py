"""One run from settings to results: evaluate, train with checkpoints, evaluate again, plot."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback

from pcr_torch.train import models, plots
from pcr_torch.train.evaluate import Evaluation, evaluate, respond
from pcr_torch.train.progress import MetricsCallback, MetricsFile, ProgressCallback, read_metrics
from pcr_torch.train.settings import Settings
from pcr_torch.train.tasks import Problem, Task, load_task
from pcr_torch.trl import PCRConfig, PCRTrainer

RETENTION_POOL = 64
RULE_OPTIONS = ("alpha", "max_boost", "prior", "discount", "update", "gate", "conflict")


class Interrupted(Exception):
    """The run was stopped by Ctrl-C after a checkpoint was saved; `step` is the last one taken."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass(frozen=True)
class Outcome:
    """Where the results lie, and the two evaluations."""

    folder: Path
    plot: Path
    metrics: Path
    before: Evaluation
    after: Evaluation
    retention_task: str
    seconds: float


def train(settings: Settings, folder: Path, *, resume: bool = False, console: Console | None = None) -> Outcome:
    """Runs or resumes training in `folder`.

    Raises:
        ValueError: bad settings, a folder that is in use, or nothing to resume.
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    console = console or Console()
    started = time.perf_counter()
    checkpoint = _claim(settings, folder, resume)
    task = load_task(
        settings.task, settings.task_options, seed=settings.seed, shots=settings.shots, style=settings.style
    )
    other = _retention_task(settings)
    problems = task.heldout(settings.heldout)
    config = _config(settings, folder)
    with console.status("preparing the model"):
        if not resume:
            shutil.rmtree(folder / "start", ignore_errors=True)
        model, tokenizer = models.load(models.prepare(settings, task, folder / "start"), task.stop)
        metrics = MetricsFile(folder / "metrics.jsonl")
        trainer = _trainer(settings, config, model, tokenizer, task, problems, metrics, console)
    settings.save(folder / "settings.json")
    with console.status("measuring the model before training"):
        before, known = _before(trainer.model, tokenizer, task, problems, other, settings, folder, resume)
    metrics.truncate(_step_of(checkpoint))
    with _graceful_interrupt(trainer, console) as interrupt:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if interrupt.asked and trainer.state.global_step < settings.steps:
        raise Interrupted(trainer.state.global_step)

    with console.status("measuring the model after training"):
        after = _measure(trainer.model, tokenizer, task, problems, (other, known) if other else None, settings)
    (folder / "after.json").write_text(json.dumps(after.to_json()) + "\n", encoding="utf-8")
    plot = plots.draw(read_metrics(metrics.path), folder / "plot.png", title=_title(settings))
    return Outcome(
        folder, plot, metrics.path, before, after, other.name if other else "", time.perf_counter() - started
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return max(found, key=_step_of, default=None)


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])


def _claim(settings: Settings, folder: Path, resume: bool) -> Path | None:
    """Checks that `folder` fits the request, and finds the checkpoint to resume."""
    file = folder / "settings.json"
    if resume:
        if not file.exists():
            raise ValueError(f"--resume: {folder} holds no settings.json, so no run of pcr-train was started there")
        different = Settings.load(file).differences(settings)
        if different:
            raise ValueError(
                f"--resume: {', '.join('--' + name.replace('_', '-') for name in different)} differs from the run in "
                f"{folder}; leave it out to continue that run, or start a new one with another --out"
            )
        checkpoint = last_checkpoint(folder)  # none: it stopped before the first, so it starts again
        if settings.steps < _step_of(checkpoint):
            raise ValueError(f"--steps: {settings.steps} is less than the {_step_of(checkpoint)} steps already taken")
    else:
        if file.exists():
            raise ValueError(f"--out: {folder} already holds a run; continue it with --resume {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = None
    return checkpoint


def _retention_task(settings: Settings) -> Task | None:
    name = settings.retention_task
    if name == settings.task:
        name = "chain_sum" if settings.task != "chain_sum" else "products"
    if name == "none":
        return None
    return load_task(name, seed=settings.seed, shots=settings.shots)


def _before(
    model: Any,
    tokenizer: Any,
    task: Task,
    problems: list[Problem],
    other: Task | None,
    settings: Settings,
    folder: Path,
    resume: bool,
) -> tuple[Evaluation, list[Problem]]:
    """The starting model's measurements, and the problems of the other task that it solves; kept in before.json."""
    file = folder / "before.json"
    pool = other.heldout(RETENTION_POOL) if other else []
    if resume and file.exists():
        values = json.loads(file.read_text(encoding="utf-8"))
        questions = set(values.pop("known"))
        return Evaluation(**values), [p for p in pool if p.question in questions]
    model.eval()
    known: list[Problem] = []
    if other is not None:
        answers = respond(model, tokenizer, [p.prompt for p in pool], max_tokens=settings.max_tokens)
        known = [p for p, a in zip(pool, answers, strict=True) if other.score(p, a) >= 1]
    before = _measure(model, tokenizer, task, problems, (other, known) if other else None, settings)
    values = {**before.to_json(), "known": [p.question for p in known]}
    file.write_text(json.dumps(values) + "\n", encoding="utf-8")
    return before, known


def _measure(
    model: Any,
    tokenizer: Any,
    task: Task,
    problems: list[Problem],
    retention: tuple[Task, list[Problem]] | None,
    settings: Settings,
) -> Evaluation:
    return evaluate(
        model,
        tokenizer,
        task,
        problems,
        retention,
        samples=settings.samples,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
    )


def _trainer(
    settings: Settings,
    config: PCRConfig,
    model: Any,
    tokenizer: Any,
    task: Task,
    heldout: list[Problem],
    metrics: MetricsFile,
    console: Console,
) -> Any:
    from datasets import Dataset

    # one row a problem in the order of training: resuming needs no shuffled sampler to be replayed
    rows = list(itertools.islice(task.training(heldout), settings.steps * settings.prompts))
    dataset = Dataset.from_dict({"prompt": [p.prompt for p in rows], "row": list(range(len(rows)))})
    log = MetricsCallback(metrics)
    trainer = PCRTrainer(
        model=model,
        reward_funcs=_reward(task, rows),
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[log, ProgressCallback(console)],
    )
    log.trainer = trainer
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def _config(settings: Settings, folder: Path) -> PCRConfig:
    parts = 1 if settings.micro_prompts is None else settings.prompts // settings.micro_prompts
    rule = {name: getattr(settings, name) for name in RULE_OPTIONS if getattr(settings, name) is not None}
    return PCRConfig(
        output_dir=str(folder),
        rule=settings.rule,
        **rule,
        blocks=settings.blocks,
        granularity=settings.granularity,
        beta=settings.beta,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.99,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.prompts * settings.generations // parts,
        gradient_accumulation_steps=parts,
        steps_per_generation=parts,  # every optimizer step starts from new responses, so a checkpoint is a whole state
        num_iterations=1,
        num_generations=settings.generations,
        max_completion_length=settings.max_tokens,
        temperature=settings.temperature,
        shuffle_dataset=False,
        seed=settings.seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )


def _reward(task: Task, rows: list[Problem]) -> Callable[..., list[float]]:
    def reward(completions: list[str], row: list[int], **_: Any) -> list[float]:
        return [task.score(rows[i], text) for i, text in zip(row, completions, strict=True)]

    return reward


class _StopCallback(TrainerCallback):  # type: ignore[misc]
    """Ends training, with a checkpoint, at the end of the step in which it was asked."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
        return control


@contextmanager
def _graceful_interrupt(trainer: Any, console: Console) -> Iterator[_StopCallback]:
    stop = _StopCallback()
    trainer.add_callback(stop)
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
    return (
        f"{name} on {settings.task}, rule {settings.rule}, beta {settings.beta:g}, "
        f"learning rate {settings.learning_rate:g}, seed {settings.seed}"
    )
