"""Several runs in one picture: a line for each, and the cosines by layer and step of each in the same colours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pcr_train import plots
from pcr_train.progress import read_metrics
from pcr_train.settings import Settings, title

LINES = (
    ("reward", "reward", "mean over responses", False),
    ("kl", "KL to the starting model", "nats a token (log)", True),
    ("grad_norm", "update, before clipping", "norm (log)", True),
    ("pcr/conflict_rate", "blocks in conflict", "fraction", False),
    ("pcr/alpha", "alpha, mean over blocks", "fraction of the conflict removed", False),
    ("pcr/boost", "boost, mean over blocks", "added KL weight, in units of beta", False),
)
"""Metric, title, unit, and whether the scale is logarithmic, in the order of the panels."""

DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Run:
    """The rows of a metrics.jsonl, and the settings beside it where they are known."""

    file: Path
    rows: list[dict[str, Any]]
    settings: Settings | None

    @property
    def name(self) -> str:
        return self.file.absolute().parent.name if self.file.name == "metrics.jsonl" else self.file.stem

    @property
    def title(self) -> str:
        return self.name if self.settings is None else title(self.settings)


def read_run(path: Path) -> Run:
    """A run from its folder or its file of metrics.

    Raises:
        ValueError: there is no such file, it holds no step, or it is damaged.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.exists():
        what = "holds no metrics.jsonl, so no run of pcr-train was started there" if path.is_dir() else "does not exist"
        raise ValueError(f"plot: {path} {what}")
    rows = read_metrics(file)
    if not rows:
        raise ValueError(f"plot: {file} holds no step yet, so there is nothing to draw")
    if not all(isinstance(row, dict) and "step" in row for row in rows):
        raise ValueError(f"plot: {file} is no metrics.jsonl of pcr-train; its lines hold no step")
    beside = file.parent / "settings.json"
    return Run(file, rows, Settings.load(beside) if beside.exists() else None)


def labels(runs: Sequence[Run]) -> list[str]:
    """Each run's name in the picture: the settings in which the runs differ, else their folders, else their paths."""
    known = [run.settings for run in runs if run.settings is not None]
    if len(known) == len(runs):
        values = [settings.__dict__ for settings in known]
        apart = [name for name in values[0] if any(value[name] != values[0][name] for value in values)]
        found = [", ".join(f"{name} {_shown(value[name])}" for name in apart) for value in values]
        if len(set(found)) == len(runs):
            return found
    names = [run.name for run in runs]
    return names if len(set(names)) == len(runs) else [str(run.file) for run in runs]


def draw_runs(runs: Sequence[Run], path: Path) -> Path:
    """Draws the runs into `path`; ImportError where matplotlib is missing."""
    named = labels(runs)
    grids = [_cosines(run) for run in runs]
    heatmaps = [at for at, grid in enumerate(grids) if grid is not None]
    figure = plots.new_figure(max(15.0, 3.6 * len(heatmaps)), 10.5 if heatmaps else 7.2)
    upper, lower = figure.subfigures(2, 1, height_ratios=(2, 1)) if heatmaps else (figure, None)
    axes = upper.subplots(2, 3)
    for axis, (key, what, unit, logarithmic) in zip(axes.flat, LINES, strict=True):
        for at, run in enumerate(runs):
            _line(axis, run.rows, key, at, named[at], logarithmic)
        plots.label_panel(axis, what, unit)
    handles, texts = axes[0, 0].get_legend_handles_labels()
    upper.legend(handles, texts, loc="outside upper left", ncols=min(4, len(runs)), frameon=False, fontsize=9)
    if lower is not None:
        _heatmaps(lower, [(named[at], runs[at], grids[at]) for at in heatmaps])
    figure.savefig(path)
    return path


def _line(axis: Any, rows: Sequence[dict[str, Any]], key: str, at: int, name: str, logarithmic: bool) -> None:
    values = plots.column(rows, key)
    if logarithmic:
        values = np.where(values > plots.KL_AT_LEAST, values, np.nan)
    steps = [row["step"] for row in rows]
    style = {"color": plots.COLOURS[at % len(plots.COLOURS)], "label": name}
    dash = DASHES[at // len(plots.COLOURS) % len(DASHES)]
    if key == "reward":  # of few responses a step: the mean of several is what can be compared
        axis.plot(steps, values, "o", color=style["color"], markersize=2.5, alpha=0.35)
        values = plots.smooth(values, min(max(3, len(rows) // 8), len(rows)))
    axis.plot(steps, values, dash, linewidth=1.8, marker="o", markersize=2 if len(rows) < 40 else 0, **style)
    if logarithmic and np.isfinite(values).any():
        axis.set_yscale("log")


def _cosines(run: Run) -> tuple[list[str], np.ndarray[Any, Any], tuple[int, int]] | None:
    measured = [row for row in run.rows if "blocks" in row]
    if not measured:
        return None
    names, grid = plots.layer_cosines(measured)
    return names, grid, (measured[0]["step"], measured[-1]["step"])


def _heatmaps(figure: Any, drawn: Sequence[tuple[str, Run, Any]]) -> None:
    finite = np.concatenate([grid[np.isfinite(grid)] for _, _, (_, grid, _) in drawn])
    limit = max(float(np.abs(finite).max()) if finite.size else 0.0, plots.HEATMAP_AT_LEAST)
    for axis, (name, _, (names, grid, ends)) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn):
        plots.heatmap(figure, axis, names, grid, ends, limit, name)
    figure.suptitle("cos(reward gradient, KL gradient)", fontsize=10.5, color=plots.INK, x=0.01, ha="left")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else os.path.basename(str(value).rstrip("/"))
