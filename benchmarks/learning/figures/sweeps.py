"""Figures from the record of a sweep: the front over beta, learning rates, gradient norms, alpha and blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.learning.experiment import Choices, Row
from benchmarks.learning.figures.style import QUIET, mark, plain
from benchmarks.learning.language_model import BASELINE, PEERS, RULES, ModelSuite, pick, score

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def front(figure: Figure, suite: ModelSuite, rows: Sequence[Row], choices: Choices) -> None:
    """Target against drift, a line a rule through the betas, at its own learning rate (of a cross, the middle one).

    Drift is the KL to the starting model, mean over the last third of the steps; the largest beta is filled.
    """
    for axis, rules, title in _panels(figure, suite):
        for rule in rules:
            rate = suite.middle[0] if suite.cross else choices[rule]["learning_rate"]
            cells = [pick(rows, rule, rate, beta) for beta in suite.grid.betas]
            x = [float(np.mean([_late(row.values["kl"]) for row in cell])) for cell in cells]
            y = [float(np.mean([row.values["target_after"] for row in cell])) for cell in cells]
            axis.plot(x, y, label=rule, markerfacecolor="white", **mark(rule))
            axis.plot(x[-1:], y[-1:], **mark(rule))
        plain(axis, title, "KL to the starting model, nats a token", "reward on held-out problems")
        axis.legend(frameon=False, fontsize=7.5)


def learning_rates(figure: Figure, suite: ModelSuite, rows: Sequence[Row]) -> None:
    """Score against learning rate, each rule at the beta that is best for it there (of a cross, the middle one)."""
    for axis, rules, title in _panels(figure, suite):
        betas = suite.middle[1:] if suite.cross else suite.grid.betas
        for rule in rules:
            best = [
                max(float(np.mean([score(r) for r in pick(rows, rule, rate, beta)])) for beta in betas)
                for rate in suite.grid.learning_rates
            ]
            axis.plot(suite.grid.learning_rates, best, label=rule, **mark(rule))
        axis.set_xscale("log")
        axis.set_xticks(suite.grid.learning_rates, [f"{rate:g}" for rate in suite.grid.learning_rates])
        axis.minorticks_off()
        plain(axis, title, "learning rate of Adam", "score: mean of learned and kept")
        axis.legend(frameon=False, fontsize=7.5)


def gradient_norms(figure: Figure, rows: Sequence[Row], rules: Sequence[str]) -> None:
    """Norm of the update before clipping: median and range over seeds, and how much it jumps from step to step."""
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for rule in rules:
        norms = np.array([row.values["grad_norm"] for row in _of(rows, rule)], dtype=float)
        look = {key: value for key, value in mark(rule).items() if key in ("color", "linewidth")}
        steps = np.arange(1, norms.shape[1] + 1)
        left.plot(steps, np.median(norms, axis=0), label=rule, **look)
        left.fill_between(steps, norms.min(0), norms.max(0), color=look["color"], alpha=0.12, linewidth=0)
    left.set_yscale("log")
    for ticks in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        ticks("{x:g}")
    left.legend(frameon=False, fontsize=7.5)
    plain(left, "norm of the update: median and range over seeds", "step", "norm (log)")
    spread = {rule: [_unrest(row.values["grad_norm"]) for row in _of(rows, rule)] for rule in rules}
    _dots(right, spread)
    plain(right, "median change of log norm a step", "", "|log ratio| of neighbouring steps")


def variants(figure: Figure, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Score, and its two parts, of each; a dot a seed, joined by grey lines, and a bar for the mean."""
    axes = figure.subplots(1, 3)
    measures: Iterable[tuple[Any, str, Any]] = zip(
        axes,
        ("learned: reward on held-out problems", "kept: known problems still solved", "score: mean of both"),
        (lambda r: r.values["target_after"], lambda r: r.values["retained"], score),
        strict=True,
    )
    for axis, title, value in measures:
        _dots(axis, {name: [float(value(row)) for row in _of(rows, name)] for name in names})
        plain(axis, title, "", "")


def _panels(figure: Figure, suite: ModelSuite) -> list[tuple[Any, list[str], str]]:
    own = [rule for rule in suite.rules if rule in RULES]
    others = [rule for rule in suite.rules if rule in PEERS]
    if not others:
        return [(figure.subplots(), own, "rules of this project")]
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    return [(left, own, "rules of this project"), (right, [BASELINE, *others], "aggregators of TorchJD")]


def _dots(axis: Any, groups: dict[str, list[float]]) -> None:
    for seed in zip(*groups.values()):
        axis.plot(range(len(groups)), seed, color=QUIET, linewidth=1, zorder=0)
    for place, (name, values) in enumerate(groups.items()):
        look = mark(name)
        axis.plot([place] * len(values), values, "o", color=look["color"], alpha=0.45, markersize=4, linewidth=0)
        axis.plot([place - 0.25, place + 0.25], [np.mean(values)] * 2, color=look["color"], linewidth=2.5)
    axis.set_xticks(range(len(groups)), [name.replace(", ", ",\n", 1) for name in groups], rotation=30, ha="right")


def _of(rows: Sequence[Row], rule: str) -> list[Row]:
    return sorted((row for row in rows if row.settings["rule"] == rule), key=lambda row: int(row.settings["seed"]))


def _late(values: Sequence[float]) -> float:
    """Mean over the last third."""
    return float(np.mean(values[-max(1, len(values) // 3) :]))


def _unrest(norms: Sequence[float]) -> float:
    return float(np.median(np.abs(np.diff(np.log(np.asarray(norms, dtype=float))))))
