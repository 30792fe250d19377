"""A part in a process of its own: an error of the device, a crash or a hang ends that part alone.

The process is forked from one that has imported everything and has not touched the device, which takes no time; or
started afresh, where an import has. Tables are written to a file as they are made, so that those of a part that is
ended are kept.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.gpu.context import Context, Cut
from benchmarks.gpu.tables import Table

Part = Callable[[Context], Iterator[Table]]
_GRACE = 10.0  # seconds after the deadline, within which a part should notice it


def run(part: Part, context: Context, start: str = "fork") -> tuple[list[Table], str, bool]:
    """Tables, what was wrong or left out in a line ("" for nothing), and whether it failed.

    Args:
        part: yields tables.
        context: whose deadline is that of the process, too.
        start: "fork"; "spawn", which imports all again, where an import has touched the device.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tables.jsonl"
        process = multiprocessing.get_context(start).Process(target=_child, args=(part, context, out))
        process.start()
        process.join(max(1.0, context.left() + _GRACE))
        hung = process.is_alive()
        if hung:
            process.kill()
            process.join()
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    tables, why, failed = [], "", False
    for record in map(json.loads, lines):
        if "error" in record:
            why, failed = record["error"], record["failed"]
        else:
            tables.append(Table(**record))
    if hung:
        return tables, f"ended after {time.monotonic() - context.began:.0f} s, since its time was up", False
    if process.exitcode and not failed:
        return tables, f"its process ended with {process.exitcode}", True
    return tables, why, failed


def _child(part: Part, context: Context, out: Path) -> None:
    with out.open("a", encoding="utf-8") as file:

        def write(record: dict[str, object]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        try:
            for table in part(context):
                write(table.record())
        except Cut as cut:
            write({"error": f"cut: {cut}", "failed": False})
        except BaseException as error:
            traceback.print_exc()
            write({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300], "failed": True})
    os._exit(0)  # nothing of the parent's is to be cleaned up here
