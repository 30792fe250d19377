"""What a report is made of: tables, plots, and claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.learning.paired import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Cells are ready text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, ["---"] * len(self.columns), *self.rows)]
        return "\n".join([f"### {self.title}", "", *([self.note, ""] if self.note else []), *lines])


@dataclass(frozen=True)
class Plot:
    """`draw` fills an empty matplotlib figure, which is saved as NAME.png beside the report."""

    name: str
    caption: str
    draw: Callable[[Figure], None]
    size: tuple[float, float] = (9.0, 4.5)


@dataclass(frozen=True)
class Claim:
    """A statement that the interval of a difference supports or not.

    Attributes:
        statement: what is compared, such as "PCR() - GRPO, noisy rewards, each at its own best".
        interval: of the difference, with the p of its test.
        headline: whether it is shown in docs/evidence.md; report.md shows all.
        spec: how its numbers are written.
    """

    statement: str
    interval: Interval
    headline: bool = False
    spec: str = "+.4f"


@dataclass(frozen=True)
class Report:
    """Sections in order; all claims of an experiment are one family for Holm's correction."""

    sections: Sequence[Table | Plot]
    claims: Sequence[Claim] = field(default_factory=tuple)
