"""Two runs of the comparison held against each other: before and after an upgrade, on one machine and on another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pcr_conformance.compare.measure import Row


@dataclass(frozen=True)
class Run:
    """What a JSON of `compare` holds of its measurements."""

    date: str
    seed: int
    environment: dict[str, str]
    rows: list[Row]

    def what(self) -> str:
        """For a heading: when, and which libraries where."""
        software = dict.fromkeys(f"{r.software or r.adapter} on {r.device}" for r in self.rows if r.device)
        return f"{self.date}: {'; '.join(software) or ', '.join(f'{k} {v}' for k, v in self.environment.items())}"


@dataclass(frozen=True)
class Change:
    """One adapter on one problem, in both runs."""

    before: Row
    after: Row


def read(path: Path) -> Run:
    """A JSON that `compare --json` wrote.

    Raises:
        ValueError: it holds no comparison; names the file.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(Row)}
        rows = [
            Row(**{name: _numbers(value) for name, value in row.items() if name in known}) for row in content["rows"]
        ]
        return Run(content["date"], content["seed"], content["environment"], rows)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a JSON of pcr-conformance compare ({type(error).__name__}: {error})") from None


def changes(before: Run, after: Run) -> list[Change]:
    """Of each problem that an adapter of the same name met in both runs, in the order of the second.

    Raises:
        ValueError: other seeds, and so other numbers; or nothing in common.
    """
    if before.seed != after.seed:
        raise ValueError(f"the runs have different numbers: seed {before.seed} and seed {after.seed}")
    known = {_key(row): row for row in before.rows}
    found = [Change(known[_key(row)], row) for row in after.rows if _key(row) in known]
    if not found:
        raise ValueError("the runs have no adapter, dtype, size and regime in common")
    return found


def missing(before: Run, after: Sequence[Change]) -> int:
    """How many measurements of the first run the second does not have."""
    return len(before.rows) - len(after)


def _key(row: Row) -> tuple[str, str, int, str]:
    return row.adapter, row.dtype, row.size, row.regime


def _numbers(value: Any) -> Any:
    """Spelled infinities and NaN as floats again."""
    if isinstance(value, dict):
        return {name: float(x) for name, x in value.items()}
    return value
