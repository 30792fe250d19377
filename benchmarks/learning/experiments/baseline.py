"""Does the baseline from measured norms help on the bandit, and is anything left of PCR's gain beside it?"""

from __future__ import annotations

import pcr_core as pcr
from benchmarks.learning.bandit import Memoryless, Method
from benchmarks.learning.experiment import Experiment, Results
from benchmarks.learning.experiments.bandit import PLACES
from benchmarks.learning.experiments.default import gains_table, over_regimes
from benchmarks.learning.paired import paired_interval
from benchmarks.learning.parts import Claim, Plot, Report, Table
from benchmarks.learning.shifts import LeaveOneOut, Measured
from benchmarks.learning.suite import DIAGNOSTICS, Suite, diagnostics
from benchmarks.learning.tables import Measured as MeasuredScores
from benchmarks.learning.tables import difference_table, measure_all, rates_plot, settings_table

HALF = pcr.PCR(alpha=0.5)
METHODS: dict[str, Method] = {
    "GRPO": Memoryless(pcr.GRPO()),
    "PCR 1/2": Memoryless(HALF),
    "GRPO + b": Measured(pcr.GRPO()),
    "PCR 1/2 + b": Measured(HALF),
    "RLOO": LeaveOneOut(pcr.GRPO()),
    "PCR 1/2, RLOO": LeaveOneOut(HALF),
    "PCR 1/2 + half of b": Measured(HALF, share=0.5),
    "PCR 1/2 + b, memory 0.5": Measured(HALF, memory=0.5),
    "PCR 1/2 + b, memory 0.97": Measured(HALF, memory=0.97),
}
SUITE = Suite(PLACES, METHODS, "GRPO", fronts=False, diagnostics=(*DIAGNOSTICS, "shift", "taken"))
PAIRS = (
    ("GRPO + b", "GRPO"),
    ("PCR 1/2", "GRPO"),
    ("PCR 1/2 + b", "PCR 1/2"),
    ("PCR 1/2 + b", "GRPO + b"),
    ("PCR 1/2 + b", "GRPO"),
    ("RLOO", "GRPO"),
)
MEASURES = {"best": "own best", "rates": "mean over learning rates", "slow": "low learning rate"}
BOLD = "Units of 0.01; 95 % paired intervals over instances, bold where they exclude 0 (before any correction)."


def report(results: Results) -> Report:
    measured = measure_all(SUITE, results)
    if len(measured) < len(PLACES):
        return Report([])
    sections: list[Table | Plot] = [settings_table(SUITE, results)]
    sections += [_means(measured, base) for base in ("GRPO", "PCR 1/2", "GRPO + b")]
    sections.append(gains_table(measured, ("PCR 1/2 + b", "GRPO + b"), ("PCR 1/2", "GRPO"), MEASURES))
    for measure, words in MEASURES.items():
        for base in ("GRPO", "PCR 1/2"):
            sections.append(difference_table(SUITE, measured, measure, f"Score, {words}, less {base}'s", BOLD, base))
    sections += [_seen(results, measured), rates_plot(SUITE, measured, list(METHODS), "rates")]
    claims = [
        Claim(f"{one} - {two}, mean over the regimes, {words}", over_regimes(measured, m, one, two), headline=True)
        for m, words in MEASURES.items()
        for one, two in PAIRS
    ]
    claims += [
        Claim(f"{one} - {two}, {regime}, own best", paired_interval(of[one].best, of[two].best))
        for one, two in PAIRS
        for regime, of in measured.items()
    ]
    return Report(sections, claims)


def _means(measured: MeasuredScores, base: str) -> Table:
    rows = [
        [method, *(f"{over_regimes(measured, measure, method, base).times(100):+.3f}" for measure in MEASURES)]
        for method in METHODS
        if method != base
    ]
    note = "A seed is an instance in every regime; paired by seed."
    return Table(f"Means over the six regimes, less those of {base}", ("units of 0.01", *MEASURES.values()), rows, note)


def _seen(results: Results, measured: MeasuredScores) -> Table:
    rows = []
    for method in METHODS:
        if "+" not in method:
            continue
        found = [diagnostics(SUITE, results.confirmation, regime, method) for regime in measured]
        rows.append([method, *(f"{of['shift']:+.2f}, {100 * of['taken']:.1f} %" for of in found)])
    note = (
        "Means over steps and instances, at own best settings. The variance is about zero, of the responses measured."
    )
    return Table("The shift, and the share of P's variance it took away", ["", *measured], rows, note)


EXPERIMENT = Experiment(
    name="baseline",
    question="Does a variance-optimal baseline from measured gradient norms help GRPO and PCR on the bandit?",
    protocol=(
        "Problem, tuning and confirmation as in the experiment `bandit`, on other seeds. `b` is the shift of "
        "docs/baseline.md: memory 0.9, pooled over both blocks, shrunk by its own variance. Predictions were written "
        "before (predictions.md beside this report)."
    ),
    selection_seeds=tuple(range(41_000, 41_032)),
    confirmation_seeds=tuple(range(42_000, 42_128)),
    jobs=SUITE.jobs,
    choose=SUITE.choose,
    report=report,
)
