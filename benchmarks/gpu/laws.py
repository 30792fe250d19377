"""Do the laws of the method hold on this device? The conformance suite, in processes beside each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.gpu.tables import Table

_COMMAND = [sys.executable, "-c", "from pcr_conformance.command import main; main()"]
_NEEDED = ("pytest", "hypothesis", "mpmath", "typer", "rich")


def laws(context: Context) -> Iterator[Table]:
    """torch, eager and in place, and cupy on the device, JAX on its default one."""
    table = Table(
        "Laws of the method",
        ["adapter", "library", "device", "mode", "passed", "skipped", "failed", "worst error / bound", "right"],
    )
    lacking = [name for name in _NEEDED if find_spec(name) is None]
    if lacking:
        table.notes.append(f"Left out, since {', '.join(lacking)} is not installed.")
        yield table
        return
    takes_device = "--device" in subprocess.run([*_COMMAND, "run", "--help"], capture_output=True, text=True).stdout
    placed = ["--device", "cuda:0"] if context.device == "cuda" else []
    wanted = {"torch": placed, "cupy": [], "jax": []}
    if placed:
        wanted["torch-in-place"] = placed
    examples = "2" if context.toy else "30"
    with tempfile.TemporaryDirectory() as folder:
        running: dict[str, tuple[subprocess.Popen[str], Path]] = {}
        for adapter, options in wanted.items():
            if find_spec(adapter.split("-")[0]) is None:
                table.notes.append(f"{adapter}: left out, since it is not installed.")
                continue
            if options and not takes_device:
                table.notes.append(f"{adapter}: on the CPU, since pcr-conformance takes no device.")
                options = []
            context.say(f"laws: {adapter}")
            out = Path(folder) / f"{adapter}.json"
            command = [*_COMMAND, "run", "--adapter", adapter, *options, "--examples", examples]
            command += ["--seed", str(context.seed), "--json", str(out)]
            process = subprocess.Popen(
                command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            running[adapter] = process, out
        for adapter, (process, out) in running.items():
            try:
                said = process.communicate(timeout=max(1.0, context.left()))[1]
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                table.notes.append(f"{adapter}: cut, since the time was up.")
                continue
            row, right = _row(out, said)
            table.rows.append([adapter, *row, right])
            table.wrong |= not right
    yield table


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # three processes share the device
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def _row(out: Path, said: str) -> tuple[list[Any], bool]:
    if not out.exists():
        lines = said.strip().splitlines()
        return [lines[-1][:200] if lines else "nothing was written", *[None] * 6], False
    found = json.loads(out.read_text(encoding="utf-8"))
    outcomes = Counter(verdict["outcome"] for verdict in found["verdicts"])
    bad = outcomes["failed"] + outcomes["xpassed"]
    where = [", ".join(sorted({v[fact] for v in found["verdicts"]})) for fact in ("software", "device", "mode")]
    skipped = outcomes["skipped"] + outcomes["xfailed"]
    return [*where, outcomes["passed"], skipped, bad, found["worst_error_over_bound"]], not bad
