"""Leave out mutants of what is never evaluated: the `|` of annotations, the bare `*` and `/` of signatures.

python .ci/mutation_filter.py SESSION
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path
from typing import Any

from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import WorkerOutcome, WorkResult

Position = tuple[int, int]


@cache
def operations(path: Path) -> list[tuple[Position, Position]]:
    """Start and end of each binary operation that runs."""
    tree = ast.parse(path.read_text())
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if isinstance(part, ast.AST)
        for inner in ast.walk(part)
    }
    found: list[Any] = [n for n in ast.walk(tree) if isinstance(n, ast.BinOp) and id(n) not in annotations]
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in found]


def main(session: str) -> None:
    with use_db(session) as database:
        for item in list(database.pending_work_items):
            (mutation,) = item.mutations
            runs = any(start <= mutation.start_pos < end for start, end in operations(mutation.module_path))
            if mutation.operator_name.startswith("core/ReplaceBinaryOperator") and not runs:
                database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


if __name__ == "__main__":
    main(sys.argv[1])
