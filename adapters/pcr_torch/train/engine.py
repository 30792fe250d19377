"""PyTorch's part of pcr-train: a Hugging Face model under `PCRTrainer`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from pcr_torch.blocks import describe_blocks
from pcr_torch.checkpoint_files import damaged, is_complete
from pcr_torch.train import models
from pcr_torch.train.answers import measuring, respond, text_nll
from pcr_torch.train.scoring import completions_only
from pcr_torch.train.tiny import make_tiny
from pcr_torch.train.trainer import make_trainer
from pcr_torch.trl import PCRTrainer
from pcr_train.progress import block_columns
from pcr_train.settings import Settings
from pcr_train.tasks import Problem, Task, load_task

SHOWN = ("reward", "kl", "loss", "grad_norm", "learning_rate", "completions/mean_length", "completions/clipped_ratio")


class TorchEngine:
    """The `pcr_train.engine.Engine` of PyTorch."""

    def __init__(self, settings: Settings, task: Task, folder: Path) -> None:
        self.settings, self.task, self.folder = settings, task, folder
        start = models.prepare(settings, task, folder / "start")
        self.model, self.tokenizer = models.load(start, task.stop)
        self.trainer: PCRTrainer | None = None

    @staticmethod
    def check(settings: Settings) -> None:
        """Everything in `Settings` is there."""

    @staticmethod
    def blocks_table(settings: Settings) -> str:
        task = load_task(settings.task, settings.task_options, seed=settings.seed)
        with tempfile.TemporaryDirectory() as scratch:
            start = Path(scratch) / "start"
            if settings.model == "tiny":
                make_tiny(task, start, seed=settings.seed, steps=1)  # which matrices it has needs no training
            model, _ = models.load(models.prepare(settings, task, start))
        return describe_blocks(model)

    @staticmethod
    def configure(settings: Settings, threads: int | None) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if threads or settings.model == "tiny":  # tiny: the cost of sharing its work is more than the work
            torch.set_num_threads(threads or 1)

    @staticmethod
    def is_complete(checkpoint: Path) -> bool:
        return is_complete(checkpoint)

    @staticmethod
    def damaged(checkpoint: Path) -> Path | None:
        return damaged(checkpoint)

    def respond(self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> list[str]:
        with measuring(self.model, seed):
            return respond(self.model, self.tokenizer, prompts, max_tokens=max_tokens, temperature=temperature)

    def text_nll(self, text: str) -> float:
        with measuring(self.model, 0):
            return text_nll(self.model, self.tokenizer, text)

    def prepare(self, heldout: Sequence[Problem]) -> None:
        self.trainer = make_trainer(self.settings, self.folder, self.model, self.tokenizer, self.task, heldout)
        self.model = self.trainer.model

    def train(
        self, checkpoint: Path | None, on_step: Callable[[dict[str, Any]], None], stopping: Callable[[], bool]
    ) -> int:
        assert self.trainer is not None
        self.trainer.add_callback(_StepCallback(self.trainer, on_step, stopping))
        with completions_only():
            self.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return int(self.trainer.state.global_step)


class _StepCallback(TrainerCallback):  # type: ignore[misc]
    """Hands on every logged step with the blocks of the trainer's last report, and ends training when asked."""

    def __init__(
        self, trainer: PCRTrainer, on_step: Callable[[dict[str, Any]], None], stopping: Callable[[], bool]
    ) -> None:
        self.trainer, self.on_step, self.stopping = trainer, on_step, stopping

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.stopping():
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "reward" not in logs:
            return
        row = {"step": state.global_step, **{k: v for k, v in logs.items() if k in SHOWN or k.startswith("pcr/")}}
        row["seconds"] = logs.get("step_time")
        report = self.trainer.last_report
        if report is not None:
            row["path"] = report.path
            described = ((b.name, b.layer, b.stack, b.family) for b in report.blocks)
            names, layers, stacks, families = zip(*described, strict=True)
            row["blocks"] = block_columns(names, layers, stacks, families, report.weights, report.statistics)
        self.on_step(row)
