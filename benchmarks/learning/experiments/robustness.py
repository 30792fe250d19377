"""Where does each rule collapse as the learning rate grows, on the tiny language model?"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.learning.experiment import Choices, Experiment, Job, Results, Row
from benchmarks.learning.experiments.tiny import settings
from benchmarks.learning.language_model import Options, measure, score
from benchmarks.learning.paired import paired_interval
from benchmarks.learning.parts import Claim, Plot, Report, Table
from pcr_train.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETA, SHARE = 0.02, 0.5
ARMS: dict[str, Options] = {
    "GRPO": {"rule": "grpo"},
    "PCR()": {"rule": "pcr"},
    "PCR.paper()": {"rule": "paper"},
    "GRPO + half of b": {"rule": "grpo", "baseline": SHARE},
    "PCR() + half of b": {"rule": "pcr", "baseline": SHARE},
    "PCR.paper() + half of b": {"rule": "paper", "baseline": SHARE},
    "GRPO, ten times the beta": {"rule": "grpo", "beta": 10 * BETA},
}
RATES, TIMES = (1e-4, 3e-4, 1e-3), (1, 2, 4, 8, 16)
PAIRS = (
    ("PCR()", "GRPO"),
    ("PCR.paper()", "GRPO"),
    ("PCR()", "GRPO, ten times the beta"),
    ("PCR.paper()", "GRPO, ten times the beta"),
    *((f"{name} + half of b", name) for name in ("GRPO", "PCR()", "PCR.paper()")),
)


def jobs(seeds: tuple[int, ...], choices: Choices | None) -> list[Job]:
    """Of selection GRPO at three learning rates; of confirmation every arm at multiples of the best of them."""
    if choices is None:
        return [_job(seed, "GRPO", rate) for seed in seeds for rate in RATES]
    rates = [_times(choices, factor) for factor in TIMES]
    return [_job(seed, arm, rate) for seed in seeds for rate in rates for arm in ARMS]


def choose(rows: Sequence[Row]) -> dict[str, float]:
    """GRPO's best learning rate."""
    means = {r: np.mean([score(row) for row in rows if row.settings["learning_rate"] == r]) for r in RATES}
    return {"learning_rate": max(means, key=lambda r: float(means[r]))}


def _times(choices: Choices, factor: int) -> float:
    return float(f"{factor * choices['learning_rate']:.3g}")


def _job(seed: int, arm: str, rate: float) -> Job:
    changes = {"beta": BETA, **ARMS[arm], "learning_rate": rate}
    return Job({"arm": arm, "learning_rate": rate, "seed": seed}, functools.partial(_run, seed, changes))


def _run(seed: int, changes: Options, folder: Path) -> dict[str, Any]:
    found = measure(Settings(**{**settings(seed).__dict__, **changes}), folder / "run")
    return {name: _finite(value) for name, value in found.items() if name != "grad_norm"}


def _finite(value: Any) -> Any:
    """None for what is not finite: a run that diverged is a result."""
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Measure = Callable[[Row], float]


def late_kl(row: Row) -> float:
    """Mean over the last third of the steps; not finite where the run diverged."""
    values = [math.inf if x is None else float(x) for x in row.values["kl"]]
    return float(np.mean(values[-(len(values) // 3) :]))


def _value(name: str) -> Measure:
    return lambda row: float(row.values[name])


def start(rows: Sequence[Row]) -> float:
    """Score of the model that was not trained."""
    return float(np.mean([(row.values["target_before"] + 1) / 2 for row in rows]))


def by_seed(rows: Sequence[Row], arm: str, rate: float, of: Measure) -> dict[int, float]:
    wanted = [r for r in rows if r.settings["arm"] == arm and r.settings["learning_rate"] == rate]
    return dict(sorted((int(row.settings["seed"]), of(row)) for row in wanted))


def collapse(scores: Mapping[int, float], limit: float) -> float | None:
    """Multiple of the best learning rate at which the score falls below `limit`, log-linear between; None: nowhere.

    Example:
        >>> collapse({1: 0.9, 2: 0.8, 4: 0.6}, 0.7) == 2**1.5
        True
    """
    factors = list(scores)
    for low, high in itertools.pairwise(factors):
        if scores[low] >= limit > scores[high]:
            share = (scores[low] - limit) / (scores[low] - scores[high])
            return float(low * (high / low) ** share)
    return None


def report(results: Results) -> Report:
    rows, choices = results.confirmation, results.choices
    seeds = sorted({int(row.settings["seed"]) for row in rows})
    if choices is None or not rows:
        return Report([])
    rates = {factor: _times(choices, factor) for factor in TIMES}
    whole = [s for s in seeds if sum(row.settings["seed"] == s for row in rows) == len(ARMS) * len(rates)]
    rows = [row for row in rows if row.settings["seed"] in whole]
    if len(whole) < 2:
        return Report([])

    def mean(arm: str, rate: float, of: Measure) -> float:
        return float(np.mean(list(by_seed(rows, arm, rate, of).values())))

    columns = ["", *(f"{factor} x, {rate:g}" for factor, rate in rates.items())]
    measures: list[tuple[str, Measure]] = [
        ("Score, mean of learned and kept", score),
        ("Learned: sampled reward on held-out problems", lambda row: float(row.values["target_after"])),
        ("Kept: share of the known that is still solved", lambda row: float(row.values["retained"])),
        ("KL to the starting model, nats a token, last third of the steps", late_kl),
    ]
    note = f"Means over {len(whole)} seeds at beta = {BETA:g}."
    sections: list[Table | Plot] = [
        Table(title, columns, [[arm, *(f"{mean(arm, r, of):.3f}" for r in rates.values())] for arm in ARMS], note)
        for title, of in measures
    ]
    limit = start(rows)
    edges = []
    for arm in ARMS:
        scores = {factor: mean(arm, rate, score) for factor, rate in rates.items()}
        found = collapse(scores, limit)
        steepest = max(scores[a] - scores[b] for a, b in itertools.pairwise(TIMES))
        edges.append([arm, "nowhere" if found is None else f"{found:.2f} x", f"{steepest:.3f}"])
    shares = [
        [arm, *(f"{mean(arm, r, _value('boosted')):.2f}, {mean(arm, r, _value('capped')):.2f}" for r in rates.values())]
        for arm in ARMS
    ]
    sections.append(Table("Shares of blocks and steps with b > 1, and with b - 1 >= 10", columns, shares, note))
    sections.append(
        Table(
            "Where it collapses, and how steep the edge is",
            ("", "score below that of the untrained model from", "largest fall of the score in one doubling"),
            edges,
            f"The untrained model has a score of {limit:.3f}. Between rates the score is interpolated.",
        )
    )
    caption = "Score, and KL of the last third of the steps, against learning rate: a point a seed, a line the mean."
    sections.append(Plot("edges", caption, functools.partial(_draw, rows, rates, limit), (11.0, 4.5)))

    def difference(a: str, b: str, chosen: Sequence[float]) -> Any:
        means = [np.mean([list(by_seed(rows, arm, r, score).values()) for r in chosen], axis=0) for arm in (a, b)]
        return paired_interval(*means)

    claims = [
        Claim(f"{a} - {b}, score, mean over the learning rates", difference(a, b, list(rates.values())), True, "+.3f")
        for a, b in PAIRS
    ]
    claims += [
        Claim(f"{a} - {b}, score, at {factor} times the best learning rate", difference(a, b, [rate]), spec="+.3f")
        for a, b in PAIRS
        for factor, rate in rates.items()
    ]
    return Report(sections, claims)


def _draw(rows: Sequence[Row], rates: Mapping[int, float], limit: float, figure: Figure) -> None:
    for axis, of, title in zip(figure.subplots(1, 2), (score, late_kl), ("score", "KL, nats a token"), strict=True):
        for i, arm in enumerate(ARMS):
            values = [list(by_seed(rows, arm, rate, of).values()) for rate in rates.values()]
            dashed = "--" if "half of b" in arm else "-"
            axis.plot(list(rates), [np.mean(v) for v in values], dashed, color=f"C{i % 3 if i < 6 else 3}", label=arm)
            for factor, seen in zip(rates, values, strict=True):
                axis.plot([factor] * len(seen), seen, ".", markersize=3, color=f"C{i % 3 if i < 6 else 3}")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(rates), [f"{factor} x" for factor in rates])
        axis.set_xlabel("learning rate, times the best")
        axis.set_title(title, fontsize=9)
        if of is score:
            axis.axhline(limit, color="0.7", linewidth=0.8)
            axis.legend(fontsize=6)


EXPERIMENT = Experiment(
    name="robustness",
    question="At which learning rate does each rule collapse on a tiny language model, with and without the baseline?",
    protocol=(
        "The model, tasks and length of the experiment `tiny`, on other seeds. GRPO's best learning rate is chosen on "
        f"selection seeds; all arms then run at 1, 2, 4, 8 and 16 times that, with beta = {BETA:g}. One more arm is "
        "GRPO with ten times the beta, about the coefficient that PCR()'s cap allows: is the robustness more than that "
        "of a larger KL term? An arm collapses where its score falls below that of the untrained model. Predictions "
        "were written before (predictions.md beside this report)."
    ),
    selection_seeds=(200, 201),
    confirmation_seeds=(300, 301, 302, 303),
    jobs=jobs,
    choose=choose,
    report=report,
)
