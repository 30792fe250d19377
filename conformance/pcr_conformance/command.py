"""The command pcr-conformance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.progress import Progress
except ImportError as missing:
    raise SystemExit(
        f"pcr-conformance needs typer and rich ({missing}); install with: pip install 'pcr-grpo[conformance]'"
    ) from None

from pcr_conformance.compare.command import compare_command
from pcr_conformance.libraries import load
from pcr_conformance.mutants.command import mutants_command
from pcr_conformance.output import show
from pcr_conformance.registry import LAWS
from pcr_conformance.trainers.command import trainers_command
from pcr_conformance.verdict import Verdict, check_matched, judge, read_xfails

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def conformance() -> None:
    """Check implementations of Probabilistic Conflict Resolution against the laws of the method."""


@app.command()
def run(
    adapter: Annotated[list[str], typer.Option(help="module:factory, or a name such as numpy, torch, jax; repeatable")],
    device: Annotated[
        str | None,
        typer.Option(help="where arrays lie: cpu, cuda:0; torch's, jax's and cupy's adapters, and factories"),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="random cases of each law")] = 100,
    seed: Annotated[int, typer.Option(help="of the random cases")] = 0,
    junit: Annotated[Path | None, typer.Option(help="write JUnit XML")] = None,
    json: Annotated[Path | None, typer.Option(help="write JSON")] = None,
    html: Annotated[Path | None, typer.Option(help="write one self-contained page")] = None,
    xfails: Annotated[Path | None, typer.Option(help="TOML with [[xfail]] adapter, law, reason")] = None,
) -> None:
    """Run every law on every adapter; the exit code is 1 where one fails, 2 where the question makes no sense."""
    console, errors = Console(), Console(stderr=True)
    try:
        adapters = [load(spec, device) for spec in adapter]
        known = read_xfails(xfails) if xfails else []
        check_matched(known, adapters)
    except (OSError, TypeError, ValueError) as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    verdicts: list[Verdict] = []
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task("laws", total=len(adapters) * len(LAWS))
        for one in adapters:
            for law in LAWS:
                progress.update(task, description=f"{one.name}: {law.name}")
                verdicts.append(judge(law, one, examples, seed, known))
                progress.advance(task)
    show(console, verdicts, seed, junit, json, html)
    if any(v.bad for v in verdicts):
        raise typer.Exit(1)


app.command("compare")(compare_command)
app.command("mutants")(mutants_command)
app.command("trainers")(trainers_command)


def main() -> None:
    app()
