"""What a run shows and writes while it trains: a live line, and metrics.jsonl with one JSON object a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from pcr_torch.report import Report
from pcr_torch.train.settings import replace_text

SHOWN = ("reward", "kl", "loss", "grad_norm", "learning_rate", "completions/mean_length", "completions/clipped_ratio")


class MetricsFile:
    """metrics.jsonl: appended and flushed every step, so an interrupted run keeps all it has written.

    A number that is not finite is written as null and its name listed under "nonfinite".
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate(self, last_step: int) -> None:
        """Keeps the steps up to `last_step`: those that a resumed run will not take again."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= last_step] if self.path.exists() else []
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        bad: list[str] = []
        clean = _finite(row, "", bad)
        if bad:
            clean["nonfinite"] = bad
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")
            file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off is left out."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise
    return rows


def block_rows(report: Report) -> dict[str, list[Any]]:
    """The per-block part of a step's row, as columns."""
    return {
        "name": [block.name for block in report.blocks],
        "layer": [block.layer for block in report.blocks],
        "family": [block.family for block in report.blocks],
        "cosine": report.weights.cosine.tolist(),
        "alpha": report.weights.alpha.tolist(),
        "conflict": report.weights.conflict.tolist(),
        "a": report.weights.plasticity.tolist(),
        "b": report.weights.stability.tolist(),
        "plasticity_sq": report.statistics.plasticity_sq.tolist(),
        "stability_sq": report.statistics.stability_sq.tolist(),
        "plasticity_var": report.statistics.plasticity_var.tolist(),
        "stability_var": report.statistics.stability_var.tolist(),
    }


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """Writes every logged step, with the blocks of the trainer's last report."""

    def __init__(self, file: MetricsFile, trainer: Any) -> None:
        self.file = file
        self.trainer = trainer

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "reward" not in logs:
            return
        row = {"step": state.global_step, **{k: v for k, v in logs.items() if k in SHOWN or k.startswith("pcr/")}}
        row["seconds"] = logs.get("step_time")
        if self.trainer.last_report is not None:
            row["blocks"] = block_rows(self.trainer.last_report)
        self.file.write(row)


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """A progress bar with live reward, KL, conflict and alpha; on a plain terminal, one line a step."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[live]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, live="")
        self.bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "reward" not in logs:
            return
        if self.bar is None:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {live(logs)}", highlight=False)
        else:
            self.bar.update(self.task, completed=state.global_step, live=live(logs))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def live(logs: dict[str, Any]) -> str:
    """The four numbers to watch."""

    def show(key: str, digits: str) -> str:
        value = logs.get(key)
        return "-" if value is None else format(value, digits)

    return (
        f"reward {show('reward', '.2f')}  KL {show('kl', '.4f')}  conflict {show('pcr/conflict_rate', '.0%')}  "
        f"alpha {show('pcr/alpha', '.3f')}"
    )


def _finite(value: Any, name: str, bad: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item, f"{name}.{key}" if name else key, bad) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, name, bad) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        if name not in bad:
            bad.append(name)
        return None
    return value
