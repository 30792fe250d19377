"""What parts find: tables, as Markdown and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Table:
    """One table.

    Attributes:
        title: what was done, in a line.
        columns: of all rows; the first is a name.
        rows: of texts and numbers.
        notes: lines below it, such as what was left out, and why.
        wrong: whether something was computed that is not right.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: bool = False

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""]
        if self.rows:
            lines += [_line(self.columns), "|" + "---|" * len(self.columns)]
            lines += [_line([_text(cell) for cell in row]) for row in self.rows] + [""]
        lines += [line for note in self.notes for line in (f"- {note}",)]
        return "\n".join(lines).rstrip() + "\n"

    def record(self) -> dict[str, Any]:
        return asdict(self)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "NO"
    if isinstance(cell, float):
        size = abs(cell)
        form = ".1e" if 0 < size < 1e-3 else ".4f" if 0 < size < 0.1 else ",.2f" if size < 100 else ",.0f"
        return format(cell, form)
    if isinstance(cell, int):
        return f"{cell:,}"
    return str(cell)
