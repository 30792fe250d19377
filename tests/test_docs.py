"""Every test that docs/supported.md names as its evidence is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CELLS = re.findall(r"`([^`]*)`", (ROOT / "docs" / "supported.md").read_text(encoding="utf-8"))


def named() -> list[tuple[str, str]]:
    """(file, test) pairs; `::test` alone belongs to the file before it."""
    found, file = [], ""
    for cell in CELLS:
        if match := re.fullmatch(r"(?:tests/train/)?(test_\w+\.py)?(?:::(test_\w+))?", cell):
            file = match[1] or file
            found.append((file, match[2] or ""))
    return [pair for pair in found if pair[0]]


@pytest.mark.parametrize(("file", "test"), sorted(set(named())))
def test_the_evidence_exists(file: str, test: str) -> None:
    (path,) = [*ROOT.glob(f"tests/*/{file}")]
    assert not test or f"def {test}(" in path.read_text(encoding="utf-8")


def test_the_table_is_read() -> None:
    assert len(named()) > 30
