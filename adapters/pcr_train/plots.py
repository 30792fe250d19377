"""One picture of a run: reward, KL, gradient norms, and what the rule saw and did in every layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

INK, QUIET = "#1f2933", "#9aa5b1"
COLOURS = ("#2563a8", "#c2571a", "#2f8f5b", "#8a4fa3", "#b8356b", "#6b7280")
HEATMAP_AT_LEAST, KL_AT_LEAST = 0.02, 1e-7


def draw(rows: Sequence[dict[str, Any]], path: Path, *, title: str) -> Path:
    """Draws the rows of a metrics.jsonl into `path` (PNG, or what the suffix says).

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no step was logged, so there is nothing to plot")
    figure = new_figure(17.5, 7.2)
    figure.suptitle(title, fontsize=12, color=INK, x=0.01, ha="left", weight="bold")
    axes = figure.subplots(2, 4)
    steps = [row["step"] for row in rows]
    _reward(axes[0, 0], steps, rows)
    _kl(axes[0, 1], steps, column(rows, "kl"))
    _norms(axes[0, 2], steps, rows)
    _conflict(axes[0, 3], steps, rows)
    measured = [row for row in rows if "blocks" in row]
    if measured:
        kinds = {"cosine": "cos(reward gradient, KL gradient)",
                 "cosine_debiased": "the same without shared sampling noise"}  # fmt: skip
        chosen = {key: [row for row in measured if key in row["blocks"]] for key in kinds}
        grids = {key: layer_cosines(some, key) for key, some in chosen.items() if some}
        finite = np.concatenate([grid[np.isfinite(grid)] for _, grid in grids.values()])
        limit = max(float(np.abs(finite).max()) if finite.size else 0.0, HEATMAP_AT_LEAST)
        for axis, (key, grid) in zip(axes[1], grids.items()):
            ends = chosen[key][0]["step"], chosen[key][-1]["step"]
            heatmap(figure, axis, *grid, ends, limit, kinds[key])
        _families(axes[1, 2], measured, "alpha", "alpha by module family", "fraction of the conflict removed")
        _families(axes[1, 3], measured, "b", "KL weight by module family", "effective KL coefficient / beta")
    for axis in axes.flat:
        if not axis.has_data():
            axis.set_axis_off()
    figure.savefig(path)
    return path


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, that is drawn without a display; ImportError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}); install it with: pip install 'pcr-grpo[plot]'") from error
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def layer_cosines(rows: Sequence[dict[str, Any]], key: str = "cosine") -> tuple[list[str], np.ndarray[Any, Any]]:
    """Mean cos(P, S) of each layer (rows) at each step (columns); blocks outside layers come last.

    Layers of several stacks, as of an encoder and a decoder, have rows of their own, named "encoder 0".
    With key="cosine_debiased" of P.S - v_ps in place of P.S.
    """
    placed = [[*zip(_places(row["blocks"]), row["blocks"][key], strict=True)] for row in rows]
    seen = dict.fromkeys(place for row in placed for place, _ in row)
    stacks = list(dict.fromkeys(stack for stack, layer in seen if layer is not None))
    places = sorted(seen, key=lambda at: (1, 0, 0) if at[1] is None else (0, stacks.index(at[0]), at[1]))
    grid = np.full((len(places), len(rows)), np.nan)
    for column, row in enumerate(placed):
        for line, place in enumerate(places):
            found = [cosine for at, cosine in row if at == place and cosine is not None]
            if found:
                grid[line, column] = np.mean(found)
    short = dict(zip(stacks, _distinct(stacks), strict=True))
    return ["other" if i is None else f"{short[stack]} {i}".strip() for stack, i in places], grid


def _places(blocks: dict[str, Any]) -> list[tuple[str, int | None]]:
    """Stack and layer of each block; ("", None) outside layers."""
    stacks = blocks.get("stack", [None] * len(blocks["layer"]))  # not in files of earlier versions
    return [("" if i is None else stack or "", i) for stack, i in zip(stacks, blocks["layer"], strict=True)]


def _distinct(stacks: Sequence[str]) -> list[str]:
    """Paths without the words that all begin or end with; "" of the only one."""
    paths = [re.split(r"[./]", stack) for stack in stacks]
    if len(paths) < 2:
        return [""] * len(paths)
    for end in (0, -1):
        while all(len(path) > 1 for path in paths) and len({path[end] for path in paths}) == 1:
            for path in paths:
                del path[end]
    return [".".join(path) for path in paths]


def _reward(axis: Any, steps: list[int], rows: Sequence[dict[str, Any]]) -> None:
    reward = column(rows, "reward")
    axis.plot(steps, reward, "o", color=QUIET, markersize=4, label="mean of a step")
    width = min(max(3, len(reward) // 8), len(reward))
    axis.plot(steps, smooth(reward, width), color=COLOURS[0], linewidth=2.2, label=f"mean of {width} steps")
    axis.legend(frameon=False, fontsize=8, loc="best")
    label_panel(axis, "reward", "mean over responses")


def _norms(axis: Any, steps: list[int], rows: Sequence[dict[str, Any]]) -> None:
    names = (
        ("grad_norm", "update, before clipping", INK),
        ("pcr/plasticity_norm", "reward gradient (in the blocks)", COLOURS[0]),
        ("pcr/stability_norm", "KL gradient (in the blocks)", COLOURS[1]),
    )
    for key, label, colour in names:
        values = column(rows, key)
        if np.isfinite(values).any():
            axis.plot(steps, np.where(values > 0, values, np.nan), color=colour, linewidth=1.6, label=label)
    if axis.lines:
        axis.set_yscale("log")
        axis.legend(frameon=False, fontsize=8, loc="best")
    label_panel(axis, "gradient norms", "norm (log)")


def _conflict(axis: Any, steps: list[int], rows: Sequence[dict[str, Any]]) -> None:
    for key, label, colour, dash in (
        ("pcr/conflict_rate", "blocks in conflict", COLOURS[0], "-"),
        ("pcr/conflict_rate_debiased", "the same without shared noise", COLOURS[1], "-"),
        ("pcr/noise_share", "share of shared noise in the conflict", INK, ":"),
    ):
        values = column(rows, key)
        known = np.isfinite(values)  # of the noise, every K-th step's
        if known.any():
            at = np.array(steps)[known]
            axis.plot(at, values[known], dash, color=colour, linewidth=1.8, marker="o", markersize=2.5, label=label)
    if axis.lines:
        axis.set_ylim(-0.05, 1.35)  # room for the legend; a share outside is cut off
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    label_panel(axis, "conflict and sampling noise", "fraction")


def cosine_image(axis: Any, grid: np.ndarray[Any, Any], ends: tuple[int, int], limit: float) -> Any:
    """Cosines of layers (rows) and steps (columns, from ends[0] to ends[1]) in colours; red is conflict."""
    return axis.imshow(
        grid,
        aspect="auto",
        origin="lower",
        cmap="RdBu",
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
        extent=(ends[0] - 0.5, ends[1] + 0.5, -0.5, len(grid) - 0.5),
    )


def heatmap(
    figure: Any,
    axis: Any,
    names: list[str],
    grid: np.ndarray[Any, Any],
    ends: tuple[int, int],
    limit: float,
    title: str,
) -> None:
    """A panel of cosines by layer and step, with its scale of colours."""
    image = cosine_image(axis, grid, ends, limit)
    every = max(1, math.ceil(len(names) / 10))
    axis.set_yticks(range(0, len(names), every), names[::every])
    bar = figure.colorbar(image, ax=axis, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
    label_panel(axis, title, "layer", grid=False)


def _families(axis: Any, rows: Sequence[dict[str, Any]], key: str, title: str, unit: str) -> None:
    families = list(dict.fromkeys(name for row in rows for name in row["blocks"]["family"]))
    for i, family in enumerate(families[:8]):
        values = []
        for row in rows:
            blocks = zip(row["blocks"]["family"], row["blocks"][key], strict=True)
            found = [v for name, v in blocks if name == family and v is not None]
            values.append(np.mean(found) if found else np.nan)
        dash = "-" if i < len(COLOURS) else "--"
        axis.plot(
            [row["step"] for row in rows],
            values,
            dash,
            color=COLOURS[i % len(COLOURS)],
            linewidth=1.6,
            marker="o",
            markersize=2.5,
            label=family,
        )
    axis.legend(frameon=False, fontsize=8, loc="best")
    label_panel(axis, title, unit)


def _kl(axis: Any, steps: list[int], values: np.ndarray[Any, Any]) -> None:
    """On a log scale: a single unlikely token can raise a step's estimate a hundred times."""
    positive = np.where(values > KL_AT_LEAST, values, np.nan)
    if np.isfinite(positive).any():
        axis.plot(steps, positive, color=COLOURS[1], linewidth=2, marker="o", markersize=3)
        axis.set_yscale("log")
        axis.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    label_panel(axis, "KL to the starting model", "nats a token (log)")


def label_panel(axis: Any, title: str, unit: str, grid: bool = True) -> None:
    """Title, axes and grid of a panel whose horizontal axis are steps."""
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, loc="left", fontsize=10.5, color=INK)
    axis.set_xlabel("step", fontsize=9)
    axis.set_ylabel(unit, fontsize=9)
    axis.tick_params(labelsize=8, colors=INK)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if grid:
        axis.grid(True, color="#e4e7eb", linewidth=0.8)
    else:
        axis.grid(False)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def column(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray[Any, Any]:
    """A metric of each row; NaN where it is missing or null."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)


def smooth(values: np.ndarray[Any, Any], width: int) -> np.ndarray[Any, Any]:
    """Trailing mean over up to `width` steps."""
    return np.array([np.nanmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))])
