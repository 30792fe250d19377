"""Does the shift need a measurement? Against shifts that know nothing, and against one that needs no gradient norm."""

from __future__ import annotations

import pcr_core as pcr
from benchmarks.learning.bandit import Memoryless, Method
from benchmarks.learning.experiment import Experiment, Results
from benchmarks.learning.experiments.bandit import PLACES
from benchmarks.learning.experiments.default import over_regimes
from benchmarks.learning.paired import paired_interval
from benchmarks.learning.parts import Claim, Report, Table
from benchmarks.learning.shifts import Constant, Measured
from benchmarks.learning.suite import DIAGNOSTICS, Suite, diagnostics
from benchmarks.learning.tables import difference_table, measure_all, settings_table

HALF = pcr.PCR(alpha=0.5)
BASE, MINE = "PCR 1/2", "half of b"
METHODS: dict[str, Method] = {
    BASE: Memoryless(HALF),
    MINE: Measured(HALF, share=0.5),
    "half of b, memory 0.97": Measured(HALF, share=0.5, memory=0.97),
    "half of b, by logits": Measured(HALF, share=0.5, proxy=True),
    "constant -0.25": Constant(HALF, -0.25),
    "constant -0.5": Constant(HALF, -0.5),
    "constant -1": Constant(HALF, -1.0),
    "constant +0.25": Constant(HALF, 0.25),
}
SUITE = Suite(PLACES, METHODS, BASE, fronts=False, diagnostics=(*DIAGNOSTICS, "shift", "taken"))
MEASURES = {"best": "own best", "rates": "mean over learning rates", "slow": "low learning rate"}


def report(results: Results) -> Report:
    measured = measure_all(SUITE, results)
    if len(measured) < len(PLACES):
        return Report([])
    note = "Units of 0.01; 95 % paired intervals over instances, bold where they exclude 0 (before any correction)."
    tables = [settings_table(SUITE, results)]
    for base in (BASE, MINE):
        rows = [
            [name, *(f"{over_regimes(measured, m, name, base).times(100):+.3f}" for m in MEASURES)]
            for name in METHODS
            if name != base
        ]
        tables.append(
            Table(f"Means over the six regimes, less those of {base}", ("units of 0.01", *MEASURES.values()), rows)
        )
    for base in (BASE, MINE):
        tables.append(difference_table(SUITE, measured, "best", f"Score, own best, less that of {base}", note, base))
    rows = []
    for name in METHODS:
        found = [diagnostics(SUITE, results.confirmation, regime, name) for regime in measured]
        rows.append([name, *(f"{of['shift']:+.2f}, {100 * of['taken']:.1f} %" for of in found)])
    title = "The shift, and the share of P's variance it took away"
    tables.append(Table(title, ("", *measured), rows, "Means over steps and instances, at own best settings."))
    claims = [
        Claim(f"{one} - {two}, mean over the regimes, {words}", over_regimes(measured, m, one, two), headline=True)
        for m, words in MEASURES.items()
        for one, two in (
            *((name, BASE) for name in METHODS if name != BASE),
            *((MINE, name) for name in METHODS if name not in (BASE, MINE)),
        )
    ]
    claims += [
        Claim(f"{MINE} - {name}, {regime}, own best", paired_interval(of[MINE].best, of[name].best))
        for name in METHODS
        if name != MINE
        for regime, of in measured.items()
    ]
    return Report(list(tables), claims)


EXPERIMENT = Experiment(
    name="baseline_controls",
    question="Does the baseline of measured norms do more than a constant shift, or than one by the logits alone?",
    protocol=(
        "As the experiment `baseline`, on other seeds, all with PCR(1/2): half of the measured shift, half of the same "
        "with the squared norm of the derivative with respect to the logits in place of |y|^2, and shifts that are the "
        "same number in every step. Predictions were written before (predictions.md beside this report)."
    ),
    selection_seeds=tuple(range(45_000, 45_032)),
    confirmation_seeds=tuple(range(46_000, 46_128)),
    jobs=SUITE.jobs,
    choose=SUITE.choose,
    report=report,
)
