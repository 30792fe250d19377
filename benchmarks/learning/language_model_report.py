"""The report of a `ModelSuite`: what was chosen, what confirmation measured, and every rule's difference from GRPO."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.learning.experiment import Results, Row
from benchmarks.learning.figures import sweeps
from benchmarks.learning.language_model import BASELINE, RULES, ModelSuite, pick, score
from benchmarks.learning.paired import Interval, paired_interval
from benchmarks.learning.parts import Claim, Plot, Report, Table


def report(suite: ModelSuite, results: Results) -> Report:
    """Of whatever is on record; claims are made of rules only, never of variants."""
    sections: list[Table | Plot] = []
    if results.choices is None:
        return Report(sections)
    sections.append(_selection(suite, results))
    front = partial(sweeps.front, suite=suite, rows=results.selection, choices=results.choices)
    rates = partial(sweeps.learning_rates, suite=suite, rows=results.selection)
    at = "at the middle" if suite.cross else "at its own best"
    sections += [
        Plot(
            "front", f"Selection seeds: a line a rule over beta, {at} learning rate; the largest beta is filled.", front
        ),
        Plot("learning_rates", f"Selection seeds: score at each learning rate, {at} beta.", rates),
    ]
    if results.confirmation:
        sections.append(_confirmation(suite, results))
        if all("boosted" in row.values for row in results.confirmation):
            sections.append(_acts(suite, results))
    claims = []
    for rule, other in suite.pairs or [(rule, BASELINE) for rule in suite.rules if rule != BASELINE]:
        if (interval := _paired(results.confirmation, rule, other)) is not None:
            statement = f"{rule} - {other}, score, each at its own learning rate and beta"
            claims.append(Claim(statement, interval, headline=bool(suite.pairs) or rule in RULES, spec="+.3f"))
    return Report(sections, claims)


def _selection(suite: ModelSuite, results: Results) -> Table:
    assert results.choices is not None
    cells = suite.cells()
    rows = []
    for rule in suite.rules:
        chosen = (results.choices[rule]["learning_rate"], results.choices[rule]["beta"])
        values = [np.mean([score(row) for row in pick(results.selection, rule, *cell)]) for cell in cells]
        rows.append(
            [rule, *(f"**{v:.3f}**" if c == chosen else f"{v:.3f}" for c, v in zip(cells, values, strict=True))]
        )
    columns = ["rule", *(f"{rate:g}, {beta:g}" for rate, beta in cells)]
    return Table("Selection: mean score at learning rate, beta", columns, rows, "Bold: what was frozen.")


def _confirmation(suite: ModelSuite, results: Results) -> Table:
    assert results.choices is not None
    rows = []
    for name in (*suite.rules, *suite.variants):
        runs = [row for row in results.confirmation if row.settings["rule"] == name]
        if not runs:
            continue
        at = runs[0].settings
        interval = None if name == BASELINE else _paired(results.confirmation, name, BASELINE)
        shares = [row.values["noise_share"] for row in runs if row.values["noise_share"] is not None]
        rows.append(
            [
                name,
                f"{at['learning_rate']:g}",
                f"{at['beta']:g}",
                f"{_mean(runs, 'target_before'):.3f} -> {_mean(runs, 'target_after'):.3f}",
                f"{_mean(runs, 'retained'):.3f}",
                f"{_mean(runs, 'text_after') - _mean(runs, 'text_before'):+.3f}",
                f"{np.mean([score(row) for row in runs]):.3f}",
                "" if interval is None else f"{interval:+.3f}",
                f"{np.mean(shares):.2f}" if shares else "no conflict",
                f"{_mean(runs, 'processor_seconds') / len(runs[0].values['reward']):.2f}",
            ]
        )
    columns = ("rule", "learning rate", "beta", "target, before and after", "kept", "text, nats a token", "score",
               f"score - {BASELINE} [95 %]", "shared noise in the conflict", "processor seconds a step")  # fmt: skip
    seeds = len({row.settings["seed"] for row in results.confirmation})
    note = (
        f"Means over {seeds} seeds. Processor seconds are those of the whole run, measurements before and after "
        "included, divided by its steps. Outcomes are counts of few problems: an interval without width says that they "
        "came out equal on every seed, not that rules are known to be equal."
    )
    return Table("Confirmation", columns, rows, note)


def _acts(suite: ModelSuite, results: Results) -> Table:
    rows = []
    for name in suite.rules:
        runs = [row for row in results.confirmation if row.settings["rule"] == name]
        shifted = runs and all("baseline" in row.values for row in runs)
        cells = [f"{_mean(runs, key):+.3f}" if shifted else "" for key in ("baseline", "baseline_reduction")]
        rows.append([name, *cells, *(f"{_mean(runs, key):.3f}" for key in ("boosted", "capped") if runs)])
    columns = ("rule", "shift applied", "of P's variance taken away", "b > 1", "b - 1 at the cap")
    return Table("What acted", columns, rows, "Means over seeds, steps and blocks.")


def _paired(rows: list[Row] | tuple[Row, ...], rule: str, other: str) -> Interval | None:
    """None with fewer than two seeds that have both."""
    scores = {
        name: {row.settings["seed"]: score(row) for row in rows if row.settings["rule"] == name}
        for name in (rule, other)
    }
    seeds = sorted(scores[rule].keys() & scores[other].keys())
    if len(seeds) < 2:
        return None
    return paired_interval([scores[rule][s] for s in seeds], [scores[other][s] for s in seeds])


def _mean(rows: list[Row], key: str) -> float:
    return float(np.mean([row.values[key] for row in rows]))
