"""The record of a stage: JSON lines, appended one job at a time, so that a killed run goes on where it was.

Lines are of two kinds: {"environment": ...}, written whenever a run starts or goes on and valid for the lines after it,
and {"settings": ..., "values": ...} of a finished job.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pcr_core
from benchmarks.learning.experiment import Row

LIBRARIES = ("numpy", "scipy", "torch", "jax", "transformers", "trl", "torchjd")


def read_rows(path: Path) -> list[Row]:
    """All finished jobs; none where there is no file."""
    return [Row(line["settings"], line["values"]) for line in _lines(path) if "settings" in line]


def read_environments(path: Path) -> list[dict[str, Any]]:
    """What the jobs ran on, in order."""
    return [line["environment"] for line in _lines(path) if "environment" in line]


def append_row(path: Path, row: Row) -> None:
    """Numbers that are not finite are refused: a result that means nothing must not be averaged later."""
    _append(path, {"settings": dict(row.settings), "values": dict(row.values)})


def append_environment(path: Path, **more: Any) -> None:
    """Versions, date and class of machine, before the first job of a run; drops a last line that was cut off."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        whole = path.read_bytes().rpartition(b"\n")
        path.write_bytes(whole[0] + whole[1])
    _append(path, {"environment": {**environment(), **more}})


def environment() -> dict[str, Any]:
    """Versions, date and class of machine."""
    versions = {"python": platform.python_version(), "pcr_core": pcr_core.__version__}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"date": str(date.today()), "machine": machine(), "versions": versions}


def machine() -> str:
    """Class of the machine: processor, cores and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor, memory = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        facts = dict(
            re.findall(r"^(model name|cpu family)\s*:\s*(.*)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        )
        processor = f"{facts.get('model name', processor)}, family {facts.get('cpu family', 'unknown')}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    return f"{processor}, {cores} cores{memory}"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # a line without its end was cut off when the run was killed
            yield json.loads(line)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n")
