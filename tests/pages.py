"""Pages of the documentation as programs: their Python blocks, run in order in one namespace.

A block of `text` right after one is what it prints. A block that cannot run here stands under a comment
`<!-- not run: REASON -->`.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
_BLOCK = re.compile(
    r"(?:^<!-- not run:(?P<reason>[^\n]*)-->\n+)?"
    r"^```python\n(?P<code>.*?)^```\n"
    r"(?:\n```text\n(?P<printed>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """`line`: of its code in the page. `printed`: what the page says it prints, None where it says nothing."""

    line: int
    code: str
    printed: str | None
    reason: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text[: found.start("code")].count("\n"), found["code"], found["printed"], found["reason"])
        for found in _BLOCK.finditer(text)
    ]


def run(page: Path, scope: dict[str, Any], adapted: Callable[[str], str] = lambda code: code) -> dict[str, Any]:
    """The namespace after all blocks; `adapted` changes what depends on the reader's machine."""
    scope = {"__name__": page.stem, **scope}
    for block in blocks(page):
        if block.reason is not None:
            assert block.reason.strip(), f"{page.name}, line {block.line}: not run, and no reason given"
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):  # errors name the page and its line
            exec(compile("\n" * block.line + adapted(block.code), str(page), "exec"), scope)
        if block.printed is not None:
            assert out.getvalue() == block.printed, f"{page.name}, line {block.line} prints\n{out.getvalue()}"
    return scope
