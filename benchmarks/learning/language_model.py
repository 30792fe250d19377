"""Training runs of language models as jobs: one grid of learning rate and beta for every rule.

A run is `pcr_train.run.train`, the function behind the command pcr-train, with another rule in its settings; nothing
else differs between the runs of a seed, which share starting model, problems and random numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.learning.experiment import Choices, Job, Row
from benchmarks.learning.sweep import Grid
from pcr_train.engine import load_engine
from pcr_train.progress import read_metrics
from pcr_train.run import train
from pcr_train.settings import Settings

Options = Mapping[str, Any]

RULES: dict[str, Options] = {
    "GRPO": {"rule": "grpo"},
    "hard projection": {"rule": "hard"},
    "constant 1/2, capped": {"rule": "pcr", "alpha": "0.5"},
    "PCR of the paper": {"rule": "paper"},
    "PCR, capped": {"rule": "pcr", "alpha": "variance"},
    "PCR, snr, capped": {"rule": "pcr", "alpha": "snr"},
}
BASELINE = "GRPO"
SHIFT = ("baseline", "baseline_reduction")

PEERS: dict[str, Options] = {
    f"{name} (TorchJD)": {"rule": f"benchmarks.learning.peers:{name}"}
    for name in ("PCGrad", "UPGrad", "MGDA", "CAGrad")
}


@dataclass(frozen=True)
class Variant:
    """A run of confirmation at the choices of the rule `like`: it is shown, not tuned, and nothing is claimed of it."""

    like: str
    options: Options


@dataclass(frozen=True)
class ModelSuite:
    """Every rule at every learning rate and beta on selection seeds, then each at its own best on confirmation seeds.

    Attributes:
        settings: of a seed's runs, but for rule, learning rate and beta.
        rules: options of `Settings` by the name that tables show.
        grid: of learning rate and beta.
        cross: of the grid only the cells with the middle learning rate or the middle beta.
        variants: further runs of confirmation.
        pairs: what claims compare; by default every rule with GRPO.
    """

    settings: Callable[[int], Settings]
    rules: Mapping[str, Options]
    grid: Grid
    cross: bool = False
    variants: Mapping[str, Variant] = field(default_factory=dict)
    pairs: Sequence[tuple[str, str]] = ()

    @property
    def middle(self) -> tuple[float, float]:
        """Learning rate and beta in the middle of the grid."""
        rates, betas = self.grid.learning_rates, self.grid.betas
        return rates[len(rates) // 2], betas[len(betas) // 2]

    def cells(self) -> list[tuple[float, float]]:
        """Learning rates and betas that every rule runs at on selection seeds."""
        rate, beta = self.middle
        return [cell for cell in self.grid.cells() if not self.cross or cell[0] == rate or cell[1] == beta]

    def jobs(self, seeds: tuple[int, ...], choices: Choices | None) -> list[Job]:
        """Of selection where choices is None, else of confirmation."""
        if choices is None:
            cells = self.cells()
            return [self._job(s, rule, o, *at) for s in seeds for at in cells for rule, o in self.rules.items()]
        runs = [(rule, options, choices[rule]) for rule, options in self.rules.items()]
        runs += [(name, v.options, choices[v.like]) for name, v in self.variants.items()]
        return [self._job(s, rule, o, at["learning_rate"], at["beta"]) for s in seeds for rule, o, at in runs]

    def choose(self, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        """For every rule the learning rate and beta with the highest mean score; the first of the grid among equals."""
        chosen = {}
        for rule in self.rules:
            means = {at: np.mean([score(row) for row in pick(rows, rule, *at)]) for at in self.cells()}
            rate, beta = max(means, key=lambda at: float(means[at]))
            chosen[rule] = {"learning_rate": rate, "beta": beta}
        return chosen

    def _job(self, seed: int, rule: str, options: Options, learning_rate: float, beta: float) -> Job:
        settings = {"rule": rule, "learning_rate": learning_rate, "beta": beta, "seed": seed}
        return Job(
            settings, partial(_run, self.settings, seed, {**options, "learning_rate": learning_rate, "beta": beta})
        )


def pick(rows: Sequence[Row], rule: str, learning_rate: float, beta: float) -> list[Row]:
    """A rule's runs at one point of the grid, by seed."""
    wanted = {"rule": rule, "learning_rate": learning_rate, "beta": beta}
    found = [row for row in rows if all(row.settings[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda row: int(row.settings["seed"]))


def score(row: Row) -> float:
    """Mean of learned and kept: sampled reward on held-out problems, and share of the known that is still solved."""
    return (float(row.values["target_after"]) + float(row.values["retained"])) / 2


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """One run of pcr-train in `folder`, gone on with if it was begun there, as a JSON record.

    Raises:
        ValueError: the starting model solves no problem of the retention task, so there is nothing to keep.
    """
    engine = load_engine(settings.framework)
    engine.configure(settings, 1)
    began = time.process_time()
    begun = (folder / "settings.json").exists()
    outcome = train(settings, folder, resume=begun, console=Console(quiet=True), plot=False)
    seconds = time.process_time() - began
    if not outcome.after.retention:
        raise ValueError(f"the starting model solves no problem of {outcome.retention_task}: retention means nothing")
    rows = read_metrics(outcome.metrics)
    boosts = np.asarray([b - 1 for row in rows for b in row["blocks"]["b"] if b is not None])
    cap = getattr(settings.make_rule(), "max_boost", None)
    shifts = {name: [row[f"pcr/{name}"] for row in rows if f"pcr/{name}" in row] for name in SHIFT}
    before, after, meter = outcome.before, outcome.after, outcome.meter
    return {
        "target_before": float(np.mean(before.reward)),
        "target_after": float(np.mean(after.reward)),
        "greedy_before": float(np.mean(before.heldout)),
        "greedy_after": float(np.mean(after.heldout)),
        "known": len(after.retention),
        "retained": float(np.mean(after.retention)),
        "text_before": before.text,
        "text_after": after.text,
        "blocks": meter.blocks,
        "conflict_raw": meter.raw,
        "conflict_debiased": meter.debiased,
        "noise_share": None if np.isnan(meter.noise_share) else meter.noise_share,
        "boost": float(np.median(boosts)),
        "boosted": float(np.mean(boosts > 0)),
        "capped": 0.0 if cap is None else float(np.mean(boosts > 0.9999 * cap)),
        **{name: float(np.mean(values)) for name, values in shifts.items() if values},
        "processor_seconds": seconds,
        "reward": [round(row["reward"], 4) for row in rows],
        "kl": [row["kl"] and round(row["kl"], 6) for row in rows],
        "grad_norm": [row["grad_norm"] and round(row["grad_norm"], 5) for row in rows],
    }


def _run(make: Callable[[int], Settings], seed: int, changes: Options, folder: Path) -> dict[str, Any]:
    return measure(Settings(**{**make(seed).__dict__, **changes}), folder / "run")
