"""Timing and peak memory of several ways to do one job, all in one process and in turns."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

Way = Callable[[], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class Row:
    """One way: median seconds of a call, quartiles of its ratio to the first way, and peak memory in bytes."""

    name: str
    seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    memory: int
    memory_ratio: float


def compare(ways: Mapping[str, Way], *, repeats: int, device: str, held: int) -> list[Row]:
    """Measures each way `repeats` times in turns, so that a slow spell of the machine hits all of them.

    Args:
        ways: by name; each gives a context in which its job can be called. The first is the unit of all ratios.
        repeats: rounds; a ratio is the median over rounds of the quotient within the round.
        device: "cpu" or "cuda".
        held: bytes that all ways hold before they start, such as the model's parameters.
    """
    from rich.progress import track  # the tables of a GPU do without

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, int] = {}
    for name, way in track(list(ways.items()), "memory, and warming up", transient=True):
        with way() as job:
            job()
            memory[name] = held + peak_memory(job, device)
    for _ in track(range(repeats), "timing", transient=True):
        for name, way in ways.items():
            with way() as job:
                seconds[name].append(_timed(job, device))
    return rows_of(seconds, memory)


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed, as the allocator of a GPU does; else page faults vary by 3 % of an update.

    To be called before threads start: those of JAX have arenas of their own, from which large memory goes back at once.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        libc.mallopt(arena_max, 1)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def rows_of(seconds: Mapping[str, list[float]], memory: Mapping[str, int]) -> list[Row]:
    """Ratios to the first way, round by round."""
    unit = next(iter(seconds))
    rows = []
    for name, times in seconds.items():
        ratios = [t / u for t, u in zip(times, seconds[unit], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        middle = statistics.median
        quotient = memory[name] / memory[unit]
        rows.append(Row(name, middle(times), middle(ratios), low, high, memory[name], quotient))
    return rows


def _timed(job: Callable[[], None], device: str) -> float:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(job: Callable[[], None], device: str) -> int:
    """Most bytes of tensors alive at once during the job beyond those alive before it, temporaries of operators too."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        job()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        job()
    changes = [(e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        alive += change
        most = max(most, alive)
    return most


def machine(device: str) -> str:
    """What the numbers were measured on, in words."""
    if device == "jax":
        import jax

        cores = len(os.sched_getaffinity(0))
        return f"{_processor()}, JAX {jax.__version__} on {jax.devices()[0].device_kind}, cores: {cores}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}, PyTorch {torch.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def show(title: str, rows: list[Row], device: str, out: Path | None) -> None:
    """Prints the rows as a table (Markdown, to paste) and writes them as JSON."""
    print(f"{title}\n{date.today()}, {machine(device)}\n")
    print("| way | seconds | time, times the first | quartiles | peak MB | memory, times the first |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        time_columns = f"{r.seconds:.3f} | {r.ratio:.2f} | {r.ratio_low:.2f} to {r.ratio_high:.2f}"
        print(f"| {r.name} | {time_columns} | {r.memory / 1e6:.0f} | {r.memory_ratio:.2f} |")
    if out is not None:
        record = {
            "title": title,
            "date": str(date.today()),
            "machine": machine(device),
            "rows": [asdict(r) for r in rows],
        }
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
