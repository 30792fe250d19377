"""Norm, length or logits again, where right and wrong answers have lengths of their own, with larger betas."""

from __future__ import annotations

from benchmarks.learning.experiment import Experiment, Results
from benchmarks.learning.experiments import baseline_sequences as first
from benchmarks.learning.paired import paired_interval
from benchmarks.learning.parts import Claim, Report, Table
from benchmarks.learning.sequences import Lengths, simulate
from benchmarks.learning.suite import Place, Suite, diagnostics
from benchmarks.learning.sweep import Grid
from benchmarks.learning.tables import difference_table, measure_all, settings_table

REGIMES = {
    "right long, wrong short": Lengths(right=(0, 0, 0, 1, 1), wrong=(1, 1, 0, 0, 0)),
    "right short, wrong long": Lengths(right=(1, 1, 0, 0, 0), wrong=(0, 0, 0, 1, 1)),
    "all of one length": Lengths(right=(0, 0, 0, 1, 0), wrong=(0, 0, 0, 1, 0)),
}
DROPPED = ("PCR 1/2 + whole, norm", "PCR 1/2, OPO", "PCR 1/2, RLOO")
METHODS = {name: method for name, method in first.METHODS.items() if name not in DROPPED}
GRID = Grid((0.0024, 0.0042, 0.0075), (0.03, 0.1, 0.3, 1.0))
PLACES = {name: Place(regime, GRID, GRID.learning_rates[1:2]) for name, regime in REGIMES.items()}
SUITE = Suite(PLACES, METHODS, "PCR 1/2", fronts=False, diagnostics=("shift", "taken", "length"), simulate=simulate)
CLAIMED = [pair for pair in first.CLAIMED if not set(pair) & set(DROPPED)]
NOTE = "Units of 0.01; 95 % paired intervals over instances, bold where they exclude 0 (before any correction)."


def report(results: Results) -> Report:
    measured = measure_all(SUITE, results)
    if not measured:
        return Report([])
    tables = [settings_table(SUITE, results)]
    for base in ("PCR 1/2", "GRPO"):
        tables.append(difference_table(SUITE, measured, "best", f"Score, own best, less {base}'s", NOTE, base))
    rows = []
    for name in METHODS:
        found = [diagnostics(SUITE, results.confirmation, regime, name) for regime in measured]
        rows.append(
            [name, *(f"{of['shift']:+.2f}, {100 * of['taken']:.0f} %, {of['length']:.1f} tokens" for of in found)]
        )
    title = "The shift, the share of P's variance it took away, and tokens a response"
    tables.append(Table(title, ["", *measured], rows, "Means over steps and instances, at own best settings."))
    claims = [
        Claim(f"{one} - {two}, {regime}, own best", paired_interval(of[one].best, of[two].best), headline=True)
        for one, two in CLAIMED
        for regime, of in measured.items()
    ]
    return Report(list(tables), claims)


EXPERIMENT = Experiment(
    name="sequences_regimes",
    question="By which weight should the baseline be estimated where length tells right answers from wrong ones?",
    protocol=(
        "As `baseline_sequences`, with right answers of four and five tokens and wrong ones of one and two, the "
        "reverse, and all of four; three learning rates and betas up to 1, on seeds of its own. Predictions and "
        "criterion were written before (docs/baseline.md, section 11)."
    ),
    selection_seeds=tuple(range(45_000, 45_008)),
    confirmation_seeds=tuple(range(46_000, 46_032)),
    jobs=SUITE.jobs,
    choose=SUITE.choose,
    report=report,
)
