"""Which alpha and which cap should `PCR()` have, and what should a user change when switching it on?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pcr_core as pcr
from benchmarks.learning.bandit import Memoryless, Method, Regime, simulate
from benchmarks.learning.experiment import Choices, Experiment, Job, Results, Row
from benchmarks.learning.experiments.bandit import PLACES
from benchmarks.learning.paired import Interval, paired_interval, ratio_of_means
from benchmarks.learning.parts import Claim, Plot, Report, Table
from benchmarks.learning.suite import CHUNK, Suite, settings_of
from benchmarks.learning.tables import (
    Measured,
    difference_table,
    measure_all,
    rates_plot,
    settings_table,
)

RULES: dict[str, pcr.Rule] = {
    "GRPO": pcr.GRPO(),
    **{f"1/2, cap {cap}": pcr.PCR(alpha=0.5, max_boost=float(cap)) for cap in (3, 10, 30, 100)},
    **{f"1/4, cap {cap}": pcr.PCR(alpha=0.25, max_boost=float(cap)) for cap in (10, 30)},
    **{f"snr, cap {cap}": pcr.PCR(alpha="snr", max_boost=float(cap)) for cap in (10, 30)},
    **{f"variance, cap {cap}": pcr.PCR(alpha="variance", max_boost=float(cap)) for cap in (10, 30)},
}
SUITE = Suite(PLACES, {name: Memoryless(rule) for name, rule in RULES.items()}, "GRPO", fronts=False)
FACTORS = (1.0, 0.5, 0.3, 0.1)
MEASURES = {"best": "own best", "rates": "mean over learning rates", "slow": "low learning rate"}


def jobs(seeds: tuple[int, ...], choices: Choices | None) -> list[Job]:
    """The suite's, and at confirmation those of switching on."""
    out = SUITE.jobs(seeds, choices)
    if choices is None:
        return out
    methods = tuple(SUITE.methods.values())
    for regime, where in PLACES.items():
        rate, beta = settings_of(choices, regime, "GRPO").best
        cells = [[(rate, beta * factor) for factor in FACTORS]] * len(methods)
        for start in range(0, len(seeds), CHUNK):
            part = seeds[start : start + CHUNK]
            identity = {"regime": f"{regime}, switched on", "first_seed": part[0], "seeds": len(part)}
            out.append(Job(identity, partial(_switched, where.regime, methods, cells, part)))
    return out


def _switched(
    regime: Regime, methods: tuple[Method, ...], cells: Any, seeds: tuple[int, ...], _: Path
) -> Mapping[str, Any]:
    out = simulate(regime, methods, cells, seeds)
    return {"unit": 1e-4, "score": np.rint(1e4 * (out.target + out.general) / 2).astype(int).tolist()}


def switched(rows: Sequence[Row], regime: str, method: str) -> NDArray[np.float64]:
    """(factors, instances) scores with GRPO's best learning rate, and its best beta times each factor."""
    index = list(RULES).index(method)
    mine = [row for row in rows if row.settings["regime"] == f"{regime}, switched on"]
    return 1e-4 * np.concatenate([np.asarray(row.values["score"][index], dtype=float) for row in mine], axis=-1)


def over_regimes(measured: Measured, measure: str, method: str, other: str) -> Interval:
    """Difference of the means over regimes; a seed is an instance in all of them."""
    means = [np.mean([getattr(of[m], measure) for of in measured.values()], axis=0) for m in (method, other)]
    return paired_interval(*means)


def gains_table(
    measured: Measured, with_it: tuple[str, str], without: tuple[str, str], measures: dict[str, str]
) -> Table:
    """What a change leaves of a method's gain: (method, other) with and without it, means over regimes."""
    rows = []
    for measure, words in measures.items():
        means = {m: np.mean([getattr(of[m], measure) for of in measured.values()], axis=0) for m in with_it + without}
        new, old = means[with_it[0]] - means[with_it[1]], means[without[0]] - means[without[1]]
        gains = [f"{over_regimes(measured, measure, *pair).times(100):+.3f}" for pair in (without, with_it)]
        rows.append([words, *gains, f"{paired_interval(new, old).times(100):+.3f}", f"{ratio_of_means(new, old):.2f}"])
    columns = ("units of 0.01", f"{without[0]} - {without[1]}", f"{with_it[0]} - {with_it[1]}", "second - first",
               "second/first")  # fmt: skip
    return Table("What is left of the gain", columns, rows, "Paired by seed; the ratio by bootstrap over instances.")


def report(results: Results) -> Report:
    measured = measure_all(SUITE, results)
    if len(measured) < len(PLACES):
        return Report([])
    bold = "Units of 0.01; 95 % paired intervals over instances, bold where they exclude 0 (before any correction)."
    sections: list[Table | Plot] = [
        settings_table(SUITE, results),
        _summary(measured, "GRPO"),
        _summary(measured, "1/2, cap 10"),
    ]
    for measure, title in (
        ("best", "Score at own best learning rate and beta, less GRPO's"),
        ("rates", "Score averaged over a tenfold range of learning rates, own best beta, less GRPO's"),
        ("slow", "Score at a tenth of GRPO's best learning rate, own best beta, less GRPO's"),
    ):
        sections.append(difference_table(SUITE, measured, measure, title, bold))
    sections += [_switch_table(results, factor) for factor in range(len(FACTORS))]
    sections += [_ratio_table(results), rates_plot(SUITE, measured, list(RULES), "rates")]
    others = [rule for rule in RULES if rule != "GRPO"]
    claims = [
        Claim(f"{rule} - GRPO, {regime}, {words}", paired_interval(getattr(of[rule], m), getattr(of["GRPO"], m)))
        for m, words in MEASURES.items()
        for rule in others
        for regime, of in measured.items()
    ]
    claims += [
        Claim(f"{rule} - GRPO, mean over the regimes, {words}", over_regimes(measured, m, rule, "GRPO"), headline=True)
        for m, words in MEASURES.items()
        for rule in others
    ]
    return Report(sections, claims)


def _summary(measured: Measured, base: str) -> Table:
    rows = [
        [rule, *(f"{over_regimes(measured, measure, rule, base).times(100):+.2f}" for measure in MEASURES)]
        for rule in RULES
        if rule != base
    ]
    columns = ("units of 0.01", *MEASURES.values())
    note = "A seed is an instance in every regime; paired by seed."
    return Table(f"Means over the six regimes, less those of {base}", columns, rows, note)


def _switch_table(results: Results, factor: int) -> Table:
    rows = []
    for rule in RULES:
        if rule == "GRPO":
            continue
        cells = []
        for regime in PLACES:
            baseline = switched(results.confirmation, regime, "GRPO")[FACTORS.index(1.0)]
            found = paired_interval(100 * switched(results.confirmation, regime, rule)[factor], 100 * baseline)
            cells.append(f"**{found:+.2f}**" if found.p < 0.05 else f"{found:+.2f}")
        rows.append([rule, *cells])
    title = f"Switched on at GRPO's best learning rate, with its best beta times {FACTORS[factor]:g}"
    return Table(title, ["less GRPO's at its best", *PLACES], rows, "Units of 0.01; bold where 0 is excluded.")


def _ratio_table(results: Results) -> Table:
    rows = []
    for rule in RULES:
        best = [[settings_of(results.choices or {}, regime, name).best for name in (rule, "GRPO")] for regime in PLACES]
        ratios = [(mine[0] / base[0], mine[1] / base[1]) for mine, base in best]
        mean = np.exp(np.log(ratios).mean(axis=0))
        rows.append([rule, f"{mean[0]:.2f}, {mean[1]:.2f}", *(f"{rate:.2f}, {beta:.2f}" for rate, beta in ratios)])
    title = "Own best learning rate and beta on selection seeds, as multiples of GRPO's"
    return Table(title, ["", "geometric mean", *PLACES], rows)


EXPERIMENT = Experiment(
    name="default",
    question="Which alpha and cap should PCR() have, and what should change when it is switched on?",
    protocol=(
        "Problem, tuning and confirmation as in the experiment `bandit`, on other seeds. The default is to be the "
        "simplest rule (a number before one that needs the noise) that confirmation shows to be worse than GRPO "
        "nowhere, neither at its own best nor in the mean over learning rates nor at the low one (after Holm), "
        "and that gains most in the mean over regimes, up to what the intervals can tell. Switched on: GRPO's best "
        "learning rate, and its best beta times 1, 0.5, 0.3 and 0.1."
    ),
    selection_seeds=tuple(range(200, 232)),
    confirmation_seeds=tuple(range(3000, 3128)),
    jobs=jobs,
    choose=SUITE.choose,
    report=report,
)
