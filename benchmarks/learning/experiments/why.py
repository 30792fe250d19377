"""Why does PCR gain on the bandit? PCR(1/2) taken apart: docs/why.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import pcr_core as pcr
from benchmarks.learning.bandit import Memoryless, Method, Regime, simulate
from benchmarks.learning.boosts import PRODUCTS, Boost, Quieter, watch
from benchmarks.learning.experiment import Experiment, Results
from benchmarks.learning.experiments.bandit import PLACES
from benchmarks.learning.experiments.default import gains_table, over_regimes
from benchmarks.learning.paired import paired_interval
from benchmarks.learning.parts import Claim, Plot, Report, Table
from benchmarks.learning.shifts import Measured
from benchmarks.learning.suite import Suite, diagnostics
from benchmarks.learning.tables import Measured as MeasuredScores
from benchmarks.learning.tables import difference_table, measure_all, settings_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HALF = pcr.PCR(alpha=0.5)
METHODS: dict[str, Method] = {
    "GRPO": Memoryless(pcr.GRPO()),
    "PCR": Memoryless(HALF),
    "GRPO, S expected": Boost("expected", alpha=0),
    "PCR, S expected": Boost("expected", "expected"),
    "boost on the noise of S": Boost(along="noise", sized="sampled"),
    "boost on the mean of S": Boost(along="expected", sized="sampled"),
    "boost on other responses' S": Boost(along="other"),
    "the boost's shift alone": Boost(part="shift"),
    "the boost less its shift": Boost(part="unshifted"),
    "GRPO + half of b": Measured(pcr.GRPO(), share=0.5),
    "PCR + half of b": Measured(HALF, share=0.5),
    "GRPO, log": Boost("log", alpha=0),
    "PCR, log": Boost("log", "log"),
    "P with 0.8 of its noise": Quieter(0.8),
}
PAIRS = (
    ("PCR", "GRPO"),
    ("GRPO, S expected", "GRPO"),
    ("PCR, S expected", "GRPO, S expected"),
    *((name, base) for name in ("boost on the noise of S", "boost on the mean of S", "boost on other responses' S")
      for base in ("GRPO", "PCR")),
    *((name, base) for name in ("the boost's shift alone", "the boost less its shift") for base in ("GRPO", "PCR")),
    ("GRPO + half of b", "GRPO"),
    ("PCR + half of b", "PCR"),
    ("PCR + half of b", "GRPO + half of b"),
    ("GRPO, log", "GRPO"),
    ("PCR, log", "GRPO, log"),
    ("P with 0.8 of its noise", "GRPO"),
)  # fmt: skip
MEASURES = {"best": "own best", "rates": "mean over learning rates", "slow": "low learning rate"}
OWN_S = [name for name in METHODS if "S expected" not in name and "log" not in name and "GRPO" not in name]


class _Seen:
    """Outcomes of all runs; `PRODUCTS`, at the first cell alone, are measured in runs of their own when asked for."""

    def __init__(self, regime: Regime, methods: Sequence[Method], cells: ArrayLike, seeds: Sequence[int]) -> None:
        self._settings = regime, methods, np.asarray(cells)[:, :1], seeds
        self._outcome = simulate(regime, methods, cells, seeds)

    @cached_property
    def _products(self) -> NDArray[Any]:
        watched: NDArray[Any] = simulate(*self._settings, watch).watched
        return watched

    def __getattr__(self, name: str) -> Any:
        return self._products[:, :, PRODUCTS.index(name)] if name in PRODUCTS else getattr(self._outcome, name)


SUITE = Suite(PLACES, METHODS, "GRPO", fronts=False, diagnostics=PRODUCTS, simulate=_Seen)


def report(results: Results) -> Report:
    measured = measure_all(SUITE, results)
    if len(measured) < len(PLACES):
        return Report([])
    bold = "Units of 0.01; 95 % paired intervals over instances, bold where they exclude 0 (before any correction)."
    pairs = Table(
        "Means over the six regimes",
        ("units of 0.01", *MEASURES.values()),
        [
            [f"{a}, less {b}", *(f"{over_regimes(measured, m, a, b).times(100):+.3f}" for m in MEASURES)]
            for a, b in PAIRS
        ],
        "A seed is an instance in every regime; paired by seed.",
    )
    sections: list[Table | Plot] = [settings_table(SUITE, results), pairs]
    fast = {"best": MEASURES["best"], "rates": MEASURES["rates"]}
    for with_it, without in (
        (("PCR + half of b", "GRPO + half of b"), ("PCR", "GRPO")),
        (("PCR, S expected", "GRPO, S expected"), ("PCR", "GRPO")),
        (("the boost's shift alone", "GRPO"), ("PCR", "GRPO")),
        (("the boost less its shift", "GRPO"), ("PCR", "GRPO")),
    ):
        sections.append(gains_table(measured, with_it, without, fast))
    sections += [difference_table(SUITE, measured, "best", f"Score, own best, less {base}'s", bold, base)
                 for base in ("GRPO", "PCR", "GRPO, S expected")]  # fmt: skip
    sections += [_kept(results, measured), _direction(results, measured), _noise_of_s(results, measured)]
    caption = (
        "Left: what is left of P in the update, along its noise and along its mean, a point a regime; on the line both "
        "are damped alike. Right: gain over GRPO at own best settings, mean of the regimes with its 95 % interval."
    )
    sections.append(Plot("kept", caption, partial(_draw, results, measured), (11.0, 5.0)))
    claims = [
        Claim(f"{a} - {b}, mean over the regimes, {words}", over_regimes(measured, m, a, b), headline=m == "best")
        for m, words in MEASURES.items()
        for a, b in PAIRS
    ]
    claims += [
        Claim(f"{a} - {b}, {regime}, own best", paired_interval(of[a].best, of[b].best))
        for a, b in PAIRS
        for regime, of in measured.items()
    ]
    return Report(sections, claims)


def kept(results: Results, regime: str, method: str) -> tuple[float, float]:
    """<u, nu>/|nu|^2 and <u, E P>/|E P|^2, sums over steps and instances."""
    seen = diagnostics(SUITE, results.confirmation, regime, method)
    return seen["update_noise"] / seen["noise_noise"], seen["update_mean"] / seen["mean_mean"]


def _kept(results: Results, measured: MeasuredScores) -> Table:
    rows = []
    for method in METHODS:
        found = [kept(results, regime, method) for regime in measured]
        mean = np.exp(np.mean([np.log(max(noise, 1e-3) / max(signal, 1e-3)) for noise, signal in found]))
        rows.append([method, *(f"{noise:.2f}, {signal:.2f}" for noise, signal in found), f"{mean:.2f}"])
    note = (
        "Of the update u = P + S + boost, at own best settings: <u, nu>/|nu|^2 and <u, E P>/|E P|^2, each a ratio of "
        "sums over steps and instances; nu = P - E P. Last column: geometric mean of noise/mean."
    )
    title = "What is left of P's noise and of its mean"
    return Table(title, ["", *measured, "noise/mean"], rows, note)


def _direction(results: Results, measured: MeasuredScores) -> Table:
    names = ("shift", *(name for name in PRODUCTS if name.startswith("on_")))
    rows = []
    for method in OWN_S:
        for regime in measured:
            seen = diagnostics(SUITE, results.confirmation, regime, method)
            rows.append([method, regime, *(f"{seen[name]:+.2f}" if name == "shift" else f"{100 * seen[name]:.0f} %"
                                           for name in names)])  # fmt: skip
    columns = ("method", "regime", "b of the shift", "P", "noise of P", "mean of P", "Z", "Z of other responses",
               "P and Z", "mean of S", "noise of S")  # fmt: skip
    note = "Share of the squared length of D = u - P - S along each direction, means over steps and instances."
    return Table("Which way the boost goes", columns, rows, note)


def _noise_of_s(results: Results, measured: MeasuredScores) -> Table:
    rows = []
    for method in ("GRPO", "PCR"):
        found = [diagnostics(SUITE, results.confirmation, regime, method) for regime in measured]
        rows.append([method, *(f"{100 * s['pull_noise'] / (s['pull_noise'] + s['pull_mean']):.0f} %" for s in found)])
    note = "|S - E S|^2 over |S - E S|^2 + |E S|^2, sums over steps and instances."
    return Table("How much of S is sampling noise", ["", *measured], rows, note)


def _draw(results: Results, measured: MeasuredScores, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    names = list(METHODS)
    shown = ("GRPO", "PCR", "PCR, S expected", "boost on other responses' S", "the boost's shift alone",
             "the boost less its shift")  # fmt: skip
    for method in shown:
        points = np.asarray([kept(results, regime, method) for regime in measured])
        left.scatter(points[:, 1], points[:, 0], s=18, label=method, color=_colour(method, shown))
    left.axline((0.8, 0.8), slope=1, color="0.7", linewidth=0.8)
    left.set_xlabel("left of P's mean")
    left.set_ylabel("left of P's noise")
    left.legend(fontsize=7)
    for i, method in enumerate(names[1:]):
        gain = over_regimes(measured, "best", method, "GRPO").times(100)
        right.plot([gain.low, gain.high], [-i, -i], color=_colour(method, shown))
        right.plot(gain.mean, -i, "o", markersize=4, color=_colour(method, shown))
    right.axvline(0, color="0.7", linewidth=0.8)
    right.set_yticks([-i for i in range(len(names) - 1)], names[1:], fontsize=7)
    right.set_xlabel("score less GRPO's, units of 0.01")


def _colour(method: str, shown: Sequence[str]) -> str:
    return f"C{shown.index(method)}" if method in shown else "0.4"


EXPERIMENT = Experiment(
    name="why",
    question="Why does PCR gain on the bandit: what does its boost do, and which part of it is needed?",
    protocol=(
        "Problem, tuning and confirmation as in the experiment `bandit`, on other seeds and with 16 selection "
        "instances. PCR is PCR(1/2, cap 10). `S expected` is the closed-form gradient of KL(reference || policy) on "
        "the step's prompts. A boost on another direction has the size that the boost on S has, but for that of other "
        "responses, whose size is made from their own S. `log`: the KL's gradient by k3 times the ratio, TRL's "
        "default. `half of b` as in docs/baseline.md. P's noise is P less its expectation over actions and rewards, "
        "in closed form. Predictions were written before (predictions.md beside this report)."
    ),
    selection_seeds=tuple(range(51_000, 51_016)),
    confirmation_seeds=tuple(range(52_000, 52_128)),
    jobs=SUITE.jobs,
    choose=SUITE.choose,
    report=report,
)
