"""What a run shows and writes while it trains: a live line, and metrics.jsonl with one JSON object a step."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pcr_core import BlockStatistics, Weights
from pcr_core._summary import debiased_cosine
from pcr_core.projection import NOISE
from pcr_train.settings import replace_text


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
        except json.JSONDecodeError as error:
            if number + 1 < len(lines):
                raise ValueError(f"{path}, line {number + 1}, is damaged: {error}") from error
    return rows


def block_columns(
    names: Sequence[str],
    layers: Sequence[int | None],
    stacks: Sequence[str | None],
    families: Sequence[str],
    weights: Weights[Any],
    statistics: BlockStatistics[Any],
) -> dict[str, list[Any]]:
    """The per-block part of a step's row; what needs the noise of the gradients only where that was measured.

    "stack" is the list that a layer is in, of which a model may have several.
    """
    noise = (
        {
            "cosine_debiased": debiased_cosine(statistics).tolist(),
            **{name: getattr(statistics, name).tolist() for name in NOISE},
        }
        if statistics.has_noise
        else {}
    )
    return {
        "name": list(names),
        "layer": list(layers),
        "stack": list(stacks),
        "family": list(families),
        "cosine": weights.cosine.tolist(),
        "alpha": weights.alpha.tolist(),
        "conflict": weights.conflict.tolist(),
        "a": weights.plasticity.tolist(),
        "b": weights.stability.tolist(),
        "plasticity_sq": statistics.plasticity_sq.tolist(),
        "stability_sq": statistics.stability_sq.tolist(),
        "dot": statistics.dot.tolist(),
        **noise,
    }


SLOW = {
    "loop": "the noise of the gradients takes a backward pass a response; --noise-every measures it less often",
    "mixed": "the noise of some blocks takes a backward pass a response; --noise-every measures it less often",
}
"""What a step says of its path (metrics.jsonl has it in every row), the first time that it is slow."""


class StepLine:
    """A progress bar with live reward, KL, conflict and alpha; on a plain terminal, one line a step."""

    def __init__(self, console: Console, *, total: int, done: int) -> None:
        self.console = console
        self.total = total
        self.done = done
        self.bar: Progress | None = None
        self.told: set[str] = set()

    def __enter__(self) -> StepLine:
        if self.console.is_terminal:
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
            self.task = self.bar.add_task("", total=self.total, completed=self.done, live="")
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, row: dict[str, Any]) -> None:
        path = row.get("path")
        if path in SLOW and path not in self.told:
            self.told.add(path)
            self.console.print(f"step {row['step']}: {SLOW[path]}", highlight=False)
        if self.bar is None:
            self.console.print(f"step {row['step']}/{self.total}  {live(row)}", highlight=False)
        else:
            self.bar.update(self.task, completed=row["step"], live=live(row))


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
