"""The command `pcr-conformance compare`."""

from __future__ import annotations

import datetime
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pcr_conformance.adapter import Adapter
from pcr_conformance.compare.conclude import of_change
from pcr_conformance.compare.measure import Agreement, Row, compare, labels
from pcr_conformance.compare.page import as_html, as_json, number, with_ulps
from pcr_conformance.compare.problems import REGIMES, TOKEN_REGIMES
from pcr_conformance.compare.versions import Change, Run, changes, read
from pcr_conformance.libraries import load
from pcr_conformance.report import environment

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_WIDE = 100  # columns, where a terminal has room for ulps
_REGIMES = (*REGIMES, *TOKEN_REGIMES)


def compare_command(
    adapters: Annotated[
        str, typer.Option(help="names or module:factory, with commas between; name@cuda:0 puts its arrays there")
    ] = "numpy,torch,jax",
    dtypes: Annotated[str, typer.Option(help=f"of {', '.join(_DTYPES)}")] = "float64,float32,bfloat16",
    sizes: Annotated[str, typer.Option(help="coordinates of the one block, or tokens; 1e7 takes 4 GB")] = "1e3,1e5",
    regimes: Annotated[str, typer.Option(help=f"of {', '.join(_REGIMES)}")] = ",".join(_REGIMES),
    seed: Annotated[int, typer.Option(help="of the numbers")] = 0,
    json: Annotated[Path | None, typer.Option(help="write JSON")] = None,
    html: Annotated[Path | None, typer.Option(help="write one self-contained page with plots")] = None,
    before: Annotated[
        Path | None, typer.Option(help="JSON of an earlier run: say what changed, of versions or machines")
    ] = None,
) -> None:
    """Who computes what to how many digits: errors against an extended-precision reference, agreement, order, time.

    With --before the exit code is 1 where something became worse.
    """
    errors = Console(stderr=True)
    try:
        chosen = [_loaded(spec) for spec in _listed(adapters)]
        twice = [name for name, count in Counter(labels(chosen)).items() if count > 1]
        if twice:
            raise ValueError(f"adapters: {twice[0]} is there twice")
        earlier = None if before is None else read(before)
        if earlier is not None and earlier.seed != seed:
            raise ValueError(f"before: its numbers are those of seed {earlier.seed}; run with --seed {earlier.seed}")
        kinds, cases = _listed(dtypes), _listed(regimes)
        for name in kinds:
            if name not in _DTYPES:
                raise ValueError(f"dtypes: expected some of {', '.join(_DTYPES)}, got {name!r}")
        lengths = [_size(text) for text in _listed(sizes)]
        for regime in cases:
            if regime not in _REGIMES:
                raise ValueError(f"regime: expected one of {', '.join(_REGIMES)}, got {regime!r}")
        if html is not None and find_spec("matplotlib") is None:
            raise ValueError("html: its plots need matplotlib; install with: pip install 'pcr-grpo[conformance,plot]'")
    except (OSError, TypeError, ValueError) as error:
        errors.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    rows: list[Row] = []
    agreements: list[Agreement] = []
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task("", total=len(chosen) * len(kinds) * len(lengths) * len(cases))

        def coming(what: str) -> None:
            progress.update(task, description=what)

        for found in compare(chosen, kinds, lengths, cases, seed, coming):
            if isinstance(found, Row):
                rows.append(found)
                progress.advance(task)
            else:
                agreements.append(found)
    console = Console()
    console.print(_summary(rows, ulps=console.width >= _WIDE))
    day = datetime.date.today()
    if json is not None:
        _write(json, as_json(rows, agreements, seed, day))
    made = [] if earlier is None else _changes(console, errors, earlier, Run(str(day), seed, environment(), rows))
    if html is not None:
        _write(html, as_html(rows, agreements, seed, day, earlier if made else None))
    if any(of_change(change).startswith(("Worse", "Taken before")) for change in made):
        raise typer.Exit(1)


def _loaded(spec: str) -> Adapter:
    name, _, device = spec.partition("@")
    return load(name, device or None)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _changes(console: Console, errors: Console, earlier: Run, now: Run) -> list[Change]:
    """How many rows came to which conclusion; nothing where the runs have nothing in common."""
    try:
        made = changes(earlier, now)
    except ValueError as error:
        errors.print(f"before: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    console.print(f"against {earlier.what()}", markup=False, highlight=False)
    counts = Counter((change.after.adapter, of_change(change)) for change in made)
    for (adapter, sentence), count in counts.items():
        console.print(f"  {adapter}, {count} of {len(made)} rows: {sentence}", markup=False, highlight=False)
    return made


def _summary(rows: list[Row], ulps: bool) -> Table:
    """The largest errors over the regimes; everything is in the reports."""
    kinds = {
        "dots": ("plasticity_sq", "stability_sq", "dot"),
        "scatter": ("plasticity_var", "stability_var", "covariance"),
        "weights": ("alpha", "stability weight"),
        "update": ("update",),
        "cotangents": ("plasticity cotangent", "stability cotangent"),
    }
    table = Table(
        title="largest error over the regimes" + (" (in ulps)" if ulps else ""),
        box=SIMPLE,
        padding=0,
        caption="order: coordinates reversed; bits: repeat; ms: median over the regimes; -: the adapter lacks it",
    )
    for name in ("adapter", "dtype", "size", *kinds, "order", "bits", "ms"):
        table.add_column(name, no_wrap=True)
    for key in dict.fromkeys((row.dtype, row.size, row.adapter) for row in rows):
        found = [row for row in rows if (row.dtype, row.size, row.adapter) == key]
        seen = [row for row in found if row.errors is not None and row.ulps and row.order and row.seconds is not None]
        head = (key[2], key[0], f"{key[1]:.0e}")
        if not seen:
            table.add_row(*head, *["-"] * (len(kinds) + 3), style="dim")
            continue
        errors = [_largest(seen, names, ulps) for names in kinds.values()]
        order = number(max(value for row in seen for value in row.order.values()))  # type: ignore[union-attr]
        repeats = "yes" if all(row.repeatable for row in seen) else "no"
        seconds = sorted(row.seconds for row in seen if row.seconds is not None)
        table.add_row(*head, *errors, order, repeats, f"{1e3 * seconds[len(seconds) // 2]:.1f}")
    return table


def _largest(rows: list[Row], names: tuple[str, ...], ulps: bool) -> str:
    found = [
        (row.errors[name], row.ulps[name])
        for row in rows
        if row.errors and row.ulps
        for name in names
        if name in row.errors
    ]
    if not found:
        return "-"
    return with_ulps(*max(found)) if ulps else number(max(found)[0])


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _size(text: str) -> int:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if size < 1 or size != int(size):
        raise ValueError(f"sizes: expected numbers of coordinates such as 1000 or 1e5, got {text!r}")
    return int(size)
