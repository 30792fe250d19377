"""Verdicts on a terminal and in files, for every command that gives some."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from pcr_conformance import report
from pcr_conformance.verdict import Verdict

_STYLES = {"passed": "green", "failed": "bold red", "xpassed": "bold red"}
_COLUMNS = ("adapter", "library", "device, mode", "law", "level", "dtype", "worst error / bound", "examples", "verdict")


def show(
    console: Console, verdicts: Sequence[Verdict], seed: int, junit: Path | None, json: Path | None, html: Path | None
) -> None:
    """A table, what failed and why, the files that were asked for, and the badge."""
    table = Table(*(Column(name, overflow="fold") for name in _COLUMNS))
    for row in report.rows(verdicts):
        table.add_row(*row, style=_STYLES.get(row[-1], "dim" if row[-1] in ("skipped", "xfailed") else ""))
    console.print(table)
    for v in verdicts:
        if v.bad:
            console.print(f"\n{v.law} on {v.adapter}\n{v.message}", markup=False, highlight=False)
    day = datetime.date.today()
    texts = (
        (junit, report.as_junit(verdicts)),
        (json, report.as_json(verdicts, day, seed)),
        (html, report.as_html(verdicts, day)),
    )
    for path, text in texts:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for line in report.nearest(verdicts):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(report.badge(verdicts, day), markup=False, highlight=False, soft_wrap=True)
