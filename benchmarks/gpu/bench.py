"""What a run on a device has in common: its clock, its time limit, and its tables."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import torch
from rich.console import Console

from pcr_torch import kernels


@dataclass
class Bench:
    """Where it runs, how long it may, and what was found."""

    device: torch.device
    toy: bool
    until: float
    console: Console
    started: float = field(default_factory=time.perf_counter)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, table: str, **row: Any) -> None:
        self.tables.setdefault(table, []).append(row)
        line = ", ".join(f"{key} {shown(value)}" for key, value in row.items())
        self.console.print(f"{time.perf_counter() - self.started:6.1f} s  {table}: {line}", highlight=False)

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.until

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, job: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        job()
        self.wait()
        return time.perf_counter() - start

    def fastest(self, job: Callable[[], Any], repeats: int = 5) -> float:
        self.seconds(job)
        return min(self.seconds(job) for _ in range(repeats))


def markdown(bench: Bench) -> str:
    where = (
        torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else f"{bench.device.type}, toy sizes"
    )
    lines = [f"{date.today()}, {where}, PyTorch {torch.__version__}, {kernels.chosen(bench.device)}"]
    for name, rows in bench.tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"## {name}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(shown(row.get(key, "")) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
