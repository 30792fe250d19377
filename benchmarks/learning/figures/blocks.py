"""Figures from one run of plain GRPO that measured every matrix: where the conflict is, what rules would make of it.

The run's statistics do not depend on the rules that are drawn: alpha and cos(update, S) are those that a rule would
have chosen at each step of that one trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import pcr_core
from benchmarks.learning.figures.style import INK, mark, plain
from pcr_core import BlockStatistics, Rule
from pcr_train.plots import cosine_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Blocks = Mapping[str, Any]
"""The columns of `pcr_train.progress.block_columns` of one step, and its number as "step"."""

UPDATES: dict[str, tuple[str, Rule]] = {
    "GRPO": ("GRPO", pcr_core.GRPO()),
    "PCR of the paper, literal": ("hard projection", pcr_core.PCR.paper(update="literal")),
    "PCR of the paper, anchored": ("PCR of the paper", pcr_core.PCR.paper()),
    "PCR, capped at 10": ("PCR, capped", pcr_core.PCR(alpha="variance")),
    "PCR, snr, capped at 10": ("PCR, snr, capped", pcr_core.PCR(alpha="snr")),
}


def heatmaps(figure: Figure, steps: Sequence[Blocks]) -> None:
    """cos(P, S) by layer and step: MLP and attention, as measured and without the noise both gradients share."""
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    grids = [_grid(steps, mlp, key) for mlp in (True, False) for key in ("cosine", "cosine_debiased")]
    limit = max(float(np.nanmax(np.abs(grid))) for grid in grids)
    titles = [f"{part}, {how}" for part in ("MLP", "attention") for how in ("as measured", "without shared noise")]
    for axis, grid, title in zip(axes.flat, grids, titles, strict=True):
        image = cosine_image(axis, grid, (steps[0]["step"], steps[-1]["step"]), limit)
        plain(axis, title, "step" if title.startswith("attention") else "", "layer", grid=False)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("mean cos(P, S); red is conflict", fontsize=9)
    bar.outline.set_visible(False)


def alpha_density(figure: Figure, steps: Sequence[Blocks]) -> None:
    """How alpha is spread over blocks and steps, by family of matrices; a violin with its median.

    The paper's alpha is so close to 1 that its distance from 1 is drawn, on a logarithmic axis.
    """
    families = list(dict.fromkeys(steps[0]["family"]))
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, rule in ((left, pcr_core.PCR(alpha="variance")), (right, pcr_core.PCR(alpha="snr"))):
        found: dict[str, list[float]] = {family: [] for family in families}
        for step in steps:
            present, statistics = _statistics(step)
            for family, alpha in zip(np.array(step["family"])[present], rule(statistics).alpha, strict=True):
                found[family].append(float(np.log10(1 - alpha) if axis is left else alpha))
        parts = axis.violinplot([found[f] for f in families], vert=False, showmedians=True, showextrema=False)
        for body in parts["bodies"]:
            body.set(facecolor="#56b4e9", edgecolor=INK, alpha=0.8, linewidth=0.6)
        parts["cmedians"].set(color=INK, linewidth=1.5)
        axis.set_yticks(range(1, len(families) + 1), families)
    ticks = range(int(np.floor(left.get_xlim()[0])), 1)
    left.set_xticks(ticks, [f"$10^{{{tick}}}$" for tick in ticks])
    right.set_xlim(-0.02, 1.02)
    plain(left, "alpha from variances (the paper's)", "1 - alpha", "")
    plain(right, "alpha from signal-to-noise ratios", "alpha", "")


def update_cosines(figure: Figure, steps: Sequence[Blocks]) -> None:
    """cos(update, S) at each step: median over blocks, with the middle half of the blocks."""
    axis = figure.subplots()
    for name, (look, rule) in UPDATES.items():
        quartiles = np.array([np.quantile(_cosines(rule, step), (0.25, 0.5, 0.75)) for step in steps])
        places = [step["step"] for step in steps]
        axis.plot(places, quartiles[:, 1], label=name, **mark(look))
        axis.fill_between(places, quartiles[:, 0], quartiles[:, 2], color=mark(look)["color"], alpha=0.12, linewidth=0)
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.legend(frameon=False, fontsize=8, ncols=2)
    plain(axis, "cosine of the update with the KL gradient", "step", "cos(update, S): median and quartiles over blocks")


def _cosines(rule: Rule, step: Blocks) -> Any:
    _, stats = _statistics(step)
    weights = rule(stats)
    a, b = weights.plasticity, weights.stability
    along = a * stats.dot + b * stats.stability_sq
    square = a**2 * stats.plasticity_sq + b**2 * stats.stability_sq + 2 * a * b * stats.dot
    return along / np.sqrt(np.maximum(square, np.finfo(float).tiny) * stats.stability_sq)


def _statistics(step: Blocks) -> tuple[Any, BlockStatistics[Any]]:
    """Which blocks have both gradients, and their statistics."""
    columns = {key: np.array(step[key], dtype=float) for key in
               ("plasticity_sq", "stability_sq", "dot", "plasticity_var", "stability_var", "covariance")}  # fmt: skip
    present = (columns["plasticity_sq"] > 0) & (columns["stability_sq"] > 0)
    kept = {key: column[present] for key, column in columns.items()}
    return present, BlockStatistics(**kept, size=np.ones(int(present.sum())))  # no rule here asks for the size


def _grid(steps: Sequence[Blocks], mlp: bool, key: str) -> Any:
    """(layers, steps) means over the matrices of the MLP, or of the attention."""
    layers = max(steps[0]["layer"]) + 1
    grid = np.full((layers, len(steps)), np.nan)
    for column, step in enumerate(steps):
        for layer in range(layers):
            found = [
                value
                for name, where, value in zip(step["name"], step["layer"], step[key], strict=True)
                if where == layer and (".mlp." in name) == mlp and value is not None
            ]
            grid[layer, column] = np.mean(found)
    return grid
