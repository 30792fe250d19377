"""Tables, plots and claims, made from recorded rows and never typed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.learning.experiment import Experiment, Results
from benchmarks.learning.frozen import frozen_path, read_frozen
from benchmarks.learning.paired import holm
from benchmarks.learning.parts import Claim, Plot, Table
from benchmarks.learning.record import read_environments, read_rows

FAMILY_WISE = 0.05
START, END = "<!-- claims: written by `python -m benchmarks.learning report`, not by hand -->", "<!-- end of claims -->"


def read_results(experiment: Experiment, folder: Path) -> Results:
    """Raises OutOfOrder where the frozen choices are not those of the rows."""
    choices = read_frozen(experiment, folder) if frozen_path(folder).exists() else None
    return Results(read_rows(folder / "selection.jsonl"), choices, read_rows(folder / "confirmation.jsonl"))


def write_report(experiment: Experiment, folder: Path) -> list[list[str]]:
    """Writes report.md and its plots into the folder; returns the rows of the headline claims."""
    report = experiment.report(read_results(experiment, folder))
    parts = [f"# {experiment.name}", experiment.question, experiment.protocol, _provenance(experiment, folder)]
    for section in report.sections:
        if isinstance(section, Table):
            parts.append(section.markdown())
        else:
            _save(section, folder / f"{section.name}.png")
            parts.append(f"![{section.caption}]({section.name}.png)\n\n{section.caption}")
    claims = claim_rows(report.claims)
    if claims:
        parts.append(Table("Claims", CLAIM_COLUMNS, claims, CLAIM_NOTE).markdown())
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [cells for cells, claim in zip(claims, report.claims, strict=True) if claim.headline]


CLAIM_COLUMNS = ("claim", "difference [95 %]", "instances", "p after Holm", "shown")
CLAIM_NOTE = "Paired differences on confirmation seeds; Holm's correction over all claims of the experiment."


def claim_rows(claims: Sequence[Claim]) -> list[list[str]]:
    """Cells of CLAIM_COLUMNS."""
    rows = []
    for claim, p in zip(claims, holm([claim.interval.p for claim in claims]), strict=True):
        sign = "higher" if claim.interval.mean > 0 else "lower"
        verdict = sign if p <= FAMILY_WISE else "no difference shown"
        shown = "< 0.0001" if p < 1e-4 else f"{p:.4f}"
        rows.append([claim.statement, f"{claim.interval:{claim.spec}}", str(claim.interval.n), shown, verdict])
    return rows


def replace_claims(page: str, tables: Sequence[Table]) -> str:
    """The page with its part between the two marks replaced.

    Raises:
        ValueError: the page has no such part.
    """
    part = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
    if not part.search(page):
        raise ValueError(f"the page lacks the lines {START!r} and {END!r}")
    body = "\n\n".join(table.markdown() for table in tables)
    return part.sub(lambda _: f"{START}\n\n{body}\n\n{END}", page)


def _provenance(experiment: Experiment, folder: Path) -> str:
    lines = [f"    python -m benchmarks.learning run {experiment.name}", ""]
    for stage in ("selection", "confirmation"):
        seeds = experiment.seeds("selection" if stage == "selection" else "confirmation")
        found = read_environments(folder / f"{stage}.jsonl")
        dates = sorted({entry["date"] for entry in found})
        machines = sorted({entry["machine"] for entry in found})
        when = f"{', '.join(dates)}; {'; '.join(machines)}" if found else "not run"
        lines.append(f"- {stage.capitalize()}: seeds {_seed_text(seeds)}; {when}.")
    versions = sorted(
        {
            f"{k} {v}"
            for s in ("selection", "confirmation")
            for v_ in read_environments(folder / f"{s}.jsonl")
            for k, v in v_["versions"].items()
        }
    )
    return "\n".join([*lines, f"- {', '.join(versions)}."])


def _seed_text(seeds: Sequence[int]) -> str:
    if len(seeds) > 4 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(str(seed) for seed in seeds)


def _save(plot: Plot, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=plot.size, dpi=80, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    plot.draw(figure)
    figure.savefig(path, metadata={"Software": None})
