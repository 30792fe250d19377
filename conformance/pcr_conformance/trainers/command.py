"""pcr-conformance trainers: the laws of training stacks on those that are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pcr_conformance.output import show
from pcr_conformance.trainers.load import load_trainer
from pcr_conformance.trainers.mutants import TRAINER_MUTANTS, attack_trainer
from pcr_conformance.trainers.registry import TRAINER_LAWS
from pcr_conformance.trainers.verdict import judge_trainer
from pcr_conformance.verdict import Verdict


def trainers_command(
    adapter: Annotated[
        list[str] | None, typer.Option(help="a name such as torch, trl, jax, or module:factory; repeatable")
    ] = None,
    module: Annotated[list[str] | None, typer.Option(help="a file with a trainer: FILE or FILE:CLASS")] = None,
    examples: Annotated[int, typer.Option(min=1, help="problems of each law")] = 6,
    seed: Annotated[int, typer.Option(help="of the problems")] = 0,
    junit: Annotated[Path | None, typer.Option(help="write JUnit XML")] = None,
    json: Annotated[Path | None, typer.Option(help="write JSON")] = None,
    html: Annotated[Path | None, typer.Option(help="write one self-contained page")] = None,
    mutants: Annotated[bool, typer.Option(help="run the laws on wrong trainers, which they must notice")] = False,
) -> None:
    """Hold the update of training stacks to the loop's; exit code 1 where a law fails, 2 for what cannot be asked."""
    console, errors = Console(), Console(stderr=True)
    if mutants:
        _mutants(console, examples, seed)
        return
    try:
        specs = [*(adapter or []), *(module or [])]
        if not specs:
            raise ValueError("give a trainer: --adapter NAME, --adapter module:factory or --module FILE")
        adapters = [load_trainer(spec) for spec in specs]
    except (TypeError, ValueError) as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    verdicts: list[Verdict] = []
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task("laws", total=len(adapters) * len(TRAINER_LAWS))
        for one in adapters:
            for law in TRAINER_LAWS:
                progress.update(task, description=f"{one.name}: {law.name}")
                verdicts.append(judge_trainer(law, one, examples, seed))
                progress.advance(task)
    show(console, verdicts, seed, junit, json, html)
    for v in verdicts:
        if v.message and not v.bad:
            console.print(f"not tried: {v.law} on {v.adapter}: {v.message}", markup=False, highlight=False)
    if any(v.bad for v in verdicts):
        raise typer.Exit(1)


def _mutants(console: Console, examples: int, seed: int) -> None:
    table = Table("wrong trainer", "law", "outcome")
    survivors = 0
    for mutant in TRAINER_MUTANTS:
        killed = attack_trainer(mutant, examples, seed).outcome == "failed"
        survivors += not killed
        table.add_row(mutant.name, mutant.law, "killed" if killed else "SURVIVES", style="" if killed else "bold red")
    console.print(table)
    console.print(f"{len(TRAINER_MUTANTS) - survivors} of {len(TRAINER_MUTANTS)} killed")
    if survivors:
        raise typer.Exit(1)
