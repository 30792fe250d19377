"""A table of methods and regimes on the simulated bandit: what is run, chosen and measured, the same for all methods.

Selection runs every method on the whole grid of learning rate and beta. From its mean scores (score: mean of target and
general accuracy) five settings of each method are frozen, `Settings`; confirmation runs those and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.learning.bandit import ACTIONS, Regime, simulate
from benchmarks.learning.experiment import Choices, Job, Row
from benchmarks.learning.sweep import Grid, best_beta_over_rates, best_pair, front_height, matched_beta, nearest

CHUNK = 16
VANISHING = 1e-6
DIAGNOSTICS = ("boost", "capped", "conflict", "shared_early", "shared_late", "ratio")


@dataclass(frozen=True)
class Settings:
    """A method's frozen settings in a regime.

    Attributes:
        best: learning rate and beta with the highest score.
        over_rates: the beta with the highest mean score over `Place.rates`.
        slow: a tenth of the baseline's best learning rate; run with best beta.
        matched: the baseline's best learning rate (of the grid), and the beta at which the method retains there what
            the baseline retains at its best.
    """

    best: tuple[float, float]
    over_rates: float
    slow: float
    matched: tuple[float, float]


@dataclass(frozen=True)
class Place:
    """A regime, its grid, and the learning rates (a tenfold range) that scores are averaged over."""

    regime: Regime
    grid: Grid
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Suite:
    """`baseline` is the method that the others are compared with; without `fronts`, best, rates and slow are all.

    `diagnostics` names what is recorded of `bandit.Outcome` besides accuracies; another `simulate` is another problem.
    """

    places: Mapping[str, Place]
    methods: Mapping[str, Any]
    baseline: str
    fronts: bool = True
    diagnostics: tuple[str, ...] = DIAGNOSTICS
    simulate: Callable[..., Any] = simulate

    def jobs(self, seeds: tuple[int, ...], choices: Choices | None) -> list[Job]:
        """One per regime and CHUNK instances."""
        out = []
        for name, place in self.places.items():
            if choices is None:
                cells = [place.grid.cells()] * len(self.methods)
            else:
                cells = [self.confirmed(place, settings_of(choices, name, method)) for method in self.methods]
            for start in range(0, len(seeds), CHUNK):
                part = seeds[start : start + CHUNK]
                identity = {"regime": name, "first_seed": part[0], "seeds": len(part)}
                out.append(Job(identity, partial(self._work, place.regime, cells, part, choices is None)))
        return out

    def _work(self, regime: Regime, cells: Any, seeds: tuple[int, ...], selection: bool, _: Path) -> Mapping[str, Any]:
        out = self.simulate(regime, tuple(self.methods.values()), cells, seeds)
        accuracies = {"target": out.target, "general": out.general, "drawdown": out.drawdown}
        if selection:
            return {name: _rounded(x.mean(axis=-1)) for name, x in accuracies.items()}
        means = {name: _rounded(getattr(out, name)[:, 0].mean(axis=-1)) for name in self.diagnostics}
        if not self.fronts:
            return {"unit": 1e-4, "score": _units((out.target + out.general) / 2), **means}
        return {
            "unit": 1e-4,
            "target": _units(out.target),
            "general": _units(out.general),
            "drawdown_matched": _units(out.drawdown[:, -1]),
            **means,
        }

    def confirmed(self, place: Place, chosen: Settings) -> list[tuple[float, float]]:
        """In the order that `measures` reads: best; over the rates; slow; over beta; beta -> 0 and 0; matched."""
        rate, beta = chosen.best
        cells = [(rate, beta), *((r, chosen.over_rates) for r in place.rates), (chosen.slow, beta)]
        if not self.fronts:
            return cells
        return [*cells, *((rate, b) for b in place.grid.betas), (rate, VANISHING), (rate, 0.0), chosen.matched]

    def choose(self, rows: Sequence[Row]) -> Choices:
        """`Settings` of every regime and method, as JSON."""
        chosen: dict[str, dict[str, Any]] = {}
        for name, place in self.places.items():
            mine = [row for row in rows if row.settings["regime"] == name]
            mean = {
                key: np.average(
                    [row.values[key] for row in mine], axis=0, weights=[row.settings["seeds"] for row in mine]
                )
                for key in ("target", "general")
            }
            general = {m: place.grid.table(mean["general"][i]) for i, m in enumerate(self.methods)}
            score = {m: (place.grid.table(mean["target"][i]) + general[m]) / 2 for i, m in enumerate(self.methods)}
            best = {m: best_pair(place.grid, score[m]) for m in self.methods}
            rate = nearest(place.grid.learning_rates, best[self.baseline][0])
            row = place.grid.learning_rates.index(rate)
            wanted = float(general[self.baseline][row, int(np.argmax(score[self.baseline][row]))])
            chosen[name] = {
                m: asdict(
                    Settings(
                        best=best[m],
                        over_rates=best_beta_over_rates(place.grid, score[m], place.rates),
                        slow=best[self.baseline][0] / 10,
                        matched=(rate, matched_beta(place.grid, general[m], rate, wanted)),
                    )
                )
                for m in self.methods
            }
        return chosen


def settings_of(choices: Choices, regime: str, method: str) -> Settings:
    found = choices[regime][method]
    return Settings(tuple(found["best"]), found["over_rates"], found["slow"], tuple(found["matched"]))


@dataclass(frozen=True)
class Measures:
    """What confirmation measured of one method in one regime, each (instances,).

    Attributes:
        best: score at its own best learning rate and beta.
        rates: mean score over the learning rates, with its own best beta for that.
        fast: score at the highest of those learning rates, with the same beta.
        front_height: target accuracy along the front over beta, at its own best learning rate, mean over the general
            accuracies that the baseline's front spans.
        slow: score at a tenth of the baseline's best learning rate, with its own best beta.
        jump: |score at beta = 1e-6 - score at beta = 0|, at its own best learning rate.
        matched_drawdown, matched_general, matched_target: with the beta at which it retains as much as the baseline.
        front: target and general accuracy over the grid's betas, means over instances, (2, betas).
        over_rates: mean score at each of the learning rates, (rates,).
    """

    best: NDArray[np.float64]
    rates: NDArray[np.float64]
    fast: NDArray[np.float64]
    front_height: NDArray[np.float64]
    slow: NDArray[np.float64]
    jump: NDArray[np.float64]
    matched_drawdown: NDArray[np.float64]
    matched_general: NDArray[np.float64]
    matched_target: NDArray[np.float64]
    front: NDArray[np.float64]
    over_rates: NDArray[np.float64]


def measures(suite: Suite, rows: Sequence[Row], regime: str, method: str) -> Measures:
    """Reads confirmation's rows; what a suite without fronts lacks is empty."""
    place, index = suite.places[regime], list(suite.methods).index(method)
    mine = [row for row in rows if row.settings["regime"] == regime]

    def read(name: str, index: int = index) -> NDArray[np.float64]:
        return 1e-4 * np.concatenate([np.asarray(row.values[name][index], dtype=float) for row in mine], axis=-1)

    target, general = (read("target"), read("general")) if suite.fronts else (read("score"),) * 2
    score = (target + general) / 2
    slow = 1 + len(place.rates)
    front = slice(slow + 1, slow + 1 + (len(place.grid.betas) if suite.fronts else 0))
    none = height = np.empty(0)
    if suite.fronts:
        spanned = read("general", list(suite.methods).index(suite.baseline))[front]
        height = front_height(target[front], general[front], spanned.min(axis=0), spanned.max(axis=0), 1 / ACTIONS)
    return Measures(
        best=score[0],
        rates=score[1:slow].mean(axis=0),
        fast=score[slow - 1],
        slow=score[slow],
        over_rates=score[1:slow].mean(axis=1),
        front_height=height,
        jump=np.abs(score[-3] - score[-2]) if suite.fronts else none,
        matched_drawdown=read("drawdown_matched") if suite.fronts else none,
        matched_general=general[-1] if suite.fronts else none,
        matched_target=target[-1] if suite.fronts else none,
        front=np.stack([target[front].mean(axis=1), general[front].mean(axis=1)]) if suite.fronts else none,
    )


def diagnostics(suite: Suite, rows: Sequence[Row], regime: str, method: str) -> dict[str, float]:
    """Means over instances of `bandit.Outcome`'s diagnostics, at the method's own best settings."""
    index = list(suite.methods).index(method)
    mine = [row for row in rows if row.settings["regime"] == regime]
    weights = [row.settings["seeds"] for row in mine]
    return {
        name: float(np.average([row.values[name][index] for row in mine], weights=weights))
        for name in suite.diagnostics
    }


def _rounded(x: NDArray[Any]) -> Any:
    return [[float(f"{v:.5g}") for v in row] for row in x] if x.ndim == 2 else [float(f"{v:.5g}") for v in x]


def _units(x: NDArray[Any]) -> Any:
    return np.rint(1e4 * x).astype(int).tolist()
