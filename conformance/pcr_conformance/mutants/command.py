"""The command that scores the suite itself: how many wrong implementations its default budget notices."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pcr_conformance.mutants import MUTANTS, attack
from pcr_conformance.mutants.generated import chosen
from pcr_conformance.mutants.score import equivalents, scored


def mutants_command(
    examples: Annotated[int, typer.Option(min=1, help="random cases of each law")] = 100,
    seed: Annotated[int, typer.Option(help="of the random cases")] = 0,
    generated: Annotated[int, typer.Option(min=0, help="how many formulas to change by machine")] = 0,
    pairs: Annotated[int, typer.Option(min=0, help="how many pairs of such changes")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = 1,
) -> None:
    """Run the suite against wrong implementations: those of people by the law named beside them, then machine-made."""
    console, errors = Console(), Console(stderr=True)
    table = Table("wrong implementation", "law", "outcome")
    survivors = 0
    for mutant in track(MUTANTS, "written by hand", console=errors, transient=True):
        killed = attack(mutant, examples, seed).outcome == "failed"
        survivors += not killed
        table.add_row(mutant.name, mutant.law, "killed" if killed else "SURVIVES", style="" if killed else "bold red")
    console.print(table)
    console.print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} written by hand are killed by the law beside them")
    if generated + pairs:
        survivors += _machine_made(console, errors, generated, pairs, examples, seed, jobs)
    if survivors:
        raise typer.Exit(1)


def _machine_made(
    console: Console, errors: Console, generated: int, pairs: int, examples: int, seed: int, jobs: int
) -> int:
    """How many survive that are not known to be equivalent."""
    made, known = chosen(generated, pairs), equivalents()
    judged = [mutant for mutant in made if not mutant.known(known)]
    run = scored(judged, examples, seed, jobs)
    living = []
    for outcome in track(run, "made by machine", total=len(judged), console=errors, transient=True):
        if outcome.law is None:
            living.append(outcome.name)
            console.print(f"SURVIVES {outcome.name}", style="bold red", markup=False, highlight=False)
    console.print(
        f"{len(judged) - len(living)} of {len(judged)} made by machine are killed by some law; "
        f"{len(made) - len(judged)} more are equivalent to the right formula"
    )
    return len(living)
