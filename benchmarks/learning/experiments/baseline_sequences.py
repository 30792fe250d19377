"""Measured norm, length, or logits: by which should the baseline be estimated where responses differ in length?"""

from __future__ import annotations

import pcr_core as pcr
from benchmarks.learning.bandit import Regime
from benchmarks.learning.experiment import Experiment, Results
from benchmarks.learning.paired import paired_interval
from benchmarks.learning.parts import Claim, Report, Table
from benchmarks.learning.sequences import Treatment, simulate
from benchmarks.learning.suite import Place, Suite, diagnostics
from benchmarks.learning.sweep import Grid
from benchmarks.learning.tables import difference_table, measure_all, settings_table

HALF, GRPO = pcr.PCR(alpha=0.5), pcr.GRPO()
METHODS = {
    "GRPO": Treatment(GRPO),
    "PCR 1/2": Treatment(HALF),
    "GRPO + half, norm": Treatment(GRPO, weight="norm", share=0.5),
    "PCR 1/2 + whole, norm": Treatment(HALF, weight="norm"),
    "PCR 1/2 + half, norm": Treatment(HALF, weight="norm", share=0.5),
    "PCR 1/2 + half, length": Treatment(HALF, weight="length", share=0.5),
    "PCR 1/2 + half, logits": Treatment(HALF, weight="logits", share=0.5),
    "PCR 1/2, OPO": Treatment(HALF, mean="length"),
    "PCR 1/2, RLOO": Treatment(HALF, mean="others"),
}
GRID = Grid((0.001, 0.0018, 0.0032, 0.0056, 0.01), (0.003, 0.01, 0.03, 0.1))
PLACES = {"sequences": Place(Regime(), GRID, GRID.learning_rates[1:4])}
SUITE = Suite(PLACES, METHODS, "PCR 1/2", fronts=False, diagnostics=("shift", "taken", "length"), simulate=simulate)
MEASURES = {"best": "own best", "rates": "mean over learning rates", "slow": "low learning rate"}
CLAIMED = (
    ("PCR 1/2", "GRPO"),
    ("GRPO + half, norm", "GRPO"),
    *((name, "PCR 1/2") for name in METHODS if name.startswith("PCR 1/2 +")),
    ("PCR 1/2 + half, norm", "PCR 1/2 + half, length"),
    ("PCR 1/2 + half, norm", "PCR 1/2 + half, logits"),
    ("PCR 1/2 + half, norm", "PCR 1/2, OPO"),
    ("PCR 1/2 + half, norm", "PCR 1/2, RLOO"),
)


def report(results: Results) -> Report:
    measured = measure_all(SUITE, results)
    if not measured:
        return Report([])
    note = "Units of 0.01; 95 % paired intervals over instances, bold where they exclude 0 (before any correction)."
    tables = [settings_table(SUITE, results)]
    for base in ("PCR 1/2", "GRPO"):
        for measure, words in MEASURES.items():
            tables.append(difference_table(SUITE, measured, measure, f"Score, {words}, less {base}'s", note, base))
    rows = []
    for name in METHODS:
        found = diagnostics(SUITE, results.confirmation, "sequences", name)
        rows.append([name, f"{found['shift']:+.3f}", f"{100 * found['taken']:.1f} %", f"{found['length']:.2f}"])
    columns = ("", "shift", "of P's variance taken away", "tokens a response")
    tables.append(Table("What was done, at own best settings", columns, rows, "Means over steps and instances."))
    of = measured["sequences"]
    claims = [
        Claim(f"{one} - {two}, {words}", paired_interval(getattr(of[one], m), getattr(of[two], m)), m == "best")
        for m, words in MEASURES.items()
        for one, two in CLAIMED
    ]
    return Report(list(tables), claims)


EXPERIMENT = Experiment(
    name="baseline_sequences",
    question="By which weight should the baseline be estimated where responses differ in length?",
    protocol=(
        "GRPO for 120 steps on an autoregressive policy over four symbols and an end, answers of one to five tokens "
        "(`benchmarks/learning/sequences.py`), 8 prompts of 8 responses, Adam, Dr. GRPO's loss. The shift is that of "
        "docs/baseline.md, memory 0.9, with |y|^2 as measured, or the response's length, or the squared norm of the "
        "derivative with respect to its logits in its place. OPO is as published: rewards less their mean by length "
        "within the group. Tuning and confirmation as in the experiment `bandit`; predictions.md was written before."
    ),
    selection_seeds=tuple(range(43_000, 43_016)),
    confirmation_seeds=tuple(range(44_000, 44_064)),
    jobs=SUITE.jobs,
    choose=SUITE.choose,
    report=report,
)
