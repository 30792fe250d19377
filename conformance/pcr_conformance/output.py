"""Verdicts on a terminal and in files, for every command that gives some."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from pcr_conformance import report
from pcr_conformance.verdict import Verdict

_STYLES = {"passed": "green", "failed": "bold red", "xpassed": "bold red"}
_COLUMNS = ("law", "level", "dtype", "err/bound", "tried", "verdict")


def show(
    console: Console, verdicts: Sequence[Verdict], seed: int, junit: Path | None, json: Path | None, html: Path | None
) -> None:
    """A table for each adapter, what failed and why, the files that were asked for, and the badge."""
    tables: dict[tuple[str, ...], Table] = {}
    for adapter, software, place, *row in report.rows(verdicts):
        if (adapter, software, place) not in tables:  # within 80 columns, which a pipe has
            title = f"{adapter}: {software} on {place}" if software else f"{adapter} on {place}"
            columns = (Column(name, overflow="fold") for name in _COLUMNS)
            tables[adapter, software, place] = Table(
                *columns, title=Text(f"\n{title}"), title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False
            )
        style = _STYLES.get(row[-1], "dim" if row[-1] in ("skipped", "xfailed") else "")
        tables[adapter, software, place].add_row(*row, style=style)
    for table in tables.values():
        console.print(table)
    for text, laws in _failures(verdicts).items():
        console.print(f"\n{', '.join(laws)}\n{text}", markup=False, highlight=False)
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


def _failures(verdicts: Sequence[Verdict]) -> dict[str, list[str]]:
    """What to say of which laws: a crash that is the same in many laws is told once, with the first one's input."""
    told: dict[tuple[str, ...], str] = {}
    found: dict[str, list[str]] = {}
    for v in verdicts:
        if v.bad:
            lines = v.message.split("\n")
            crash = [line for line in lines if line.startswith("  at ")]
            text = told.setdefault((v.adapter, lines[0], *crash[-1:]) if crash else (v.adapter, v.law), v.message)
            found.setdefault(text, []).append(f"{v.law} on {v.adapter}")
    return found
