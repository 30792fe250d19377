"""The command python -m benchmarks.learning."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.learning.experiment import RESULTS, load, names
from benchmarks.learning.frozen import OutOfOrder, freeze
from benchmarks.learning.parts import Table
from benchmarks.learning.report import CLAIM_COLUMNS, CLAIM_NOTE, replace_claims, write_report
from benchmarks.learning.run import run_all, run_confirmation, run_selection

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence.md"
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Stages(StrEnum):
    all = "all"
    selection = "selection"
    freeze = "freeze"
    confirmation = "confirmation"


@app.callback()
def learning() -> None:
    """Does a rule help learning? Experiments with choices that are frozen before the confirmation seeds are run."""


@app.command("list")
def list_() -> None:
    """Names and questions of all experiments."""
    for name in names():
        Console().print(f"{name}: {load(name).question}", markup=False, highlight=False)


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="of the experiment; `list` shows them")],
    stage: Annotated[Stages, typer.Option(help="one stage only; all goes on with whatever is left")] = Stages.all,
    scratch: Annotated[Path, typer.Option(help="for partial work of unfinished jobs")] = Path("runs/learning"),
) -> None:
    """Run the jobs that are not on record: selection, then (choices frozen) confirmation.

    Start it again if killed, and several times to use several cores: every job is taken by one process.
    """
    console = Console(stderr=True)
    try:
        experiment = load(name)
        folder = RESULTS / name
        if stage is Stages.freeze:
            freeze(experiment, folder)
        else:
            chosen = {Stages.all: run_all, Stages.selection: run_selection, Stages.confirmation: run_confirmation}
            chosen[stage](experiment, folder, scratch, console)
    except (OutOfOrder, ValueError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None


@app.command()
def report(
    name: Annotated[str | None, typer.Argument(help="of the experiment; by default all that have results")] = None,
) -> None:
    """Write results/NAME/report.md with its plots; without a name also the table of claims in docs/evidence.md."""
    console = Console(stderr=True)
    tables = []
    try:
        for one in names() if name is None else [name]:
            experiment, folder = load(one), RESULTS / one
            if not (folder / "selection.jsonl").exists():
                console.print(f"{one}: nothing on record", markup=False, highlight=False)
                continue
            if claims := write_report(experiment, folder):
                note = f"`python -m benchmarks.learning run {one}`; all: `{folder.name}/report.md`. {CLAIM_NOTE}"
                tables.append(Table(one, CLAIM_COLUMNS, claims, note))
            console.print(str(folder / "report.md"), markup=False, highlight=False)
        if name is None and EVIDENCE.exists():
            page = replace_claims(EVIDENCE.read_text(encoding="utf-8"), tables)
            EVIDENCE.write_text(page, encoding="utf-8")
    except (OutOfOrder, ValueError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
