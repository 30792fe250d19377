"""How often does an update of the 0.5B model make the device wait for the host, or the host for the device?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.context import Context
from benchmarks.gpu.tables import Table
from benchmarks.gpu.timing import timed
from benchmarks.gpu.update_cost import SHAPES, TENTH, TOYS, ways

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "hipLaunchKernel", "hipModuleLaunchKernel", "hipExtModuleLaunch")
WAITS = ("StreamSynchronize", "EventSynchronize", "DeviceSynchronize")


class _Operators(TorchDispatchMode):
    """Counts what is dispatched within it."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


def counts(context: Context) -> Iterator[Table]:
    """Of each way's second step, in which buffers and indices are as they stay."""
    shape = TOYS[0] if context.toy else SHAPES[1]
    context.say(f"counts: {shape.title}")
    table = Table(
        f"Counts of an update: {shape.title}",
        ["way", "operators", "kernel launches", "waits", "copies from the host", "copies to the host",
         "device busy, ms", "ms"],
        notes=["waits: of the host for the device; the profiler's own is left out. ms: without the profiler."],
    )  # fmt: skip
    problem = shape.problem(context.device)
    for name, way in ways(problem).items():
        if name == TENTH:
            continue
        if context.left() < 3:
            table.notes.append(f"Cut, since the time was up: from {name} on.")
            break
        with way() as job:
            job()
            wall = timed(job, context.device)[0]
            with _Operators() as operators:
                job()
            table.rows.append([name, operators.total, *_profiled(job, context.device), 1e3 * wall])
    yield table


def _profiled(job: Callable[[], None], device: str) -> list[Any]:
    if device != "cuda":
        return [None] * 5
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        job()
    own = _counted(_nothing())  # what the profiler waits for by itself
    events = _counted(record)
    busy = sum(e.duration_ns() for e in record.profiler.kineto_results.events() if _on_device(e)) / 1e6

    def of(names: tuple[str, ...]) -> int:
        return sum(count - own[name] for name, count in events.items() if any(part in name for part in names))

    return [of(LAUNCHES), of(WAITS), of(("Memcpy HtoD",)), of(("Memcpy DtoH",)), busy]


def _nothing() -> Any:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        pass
    return record


def _counted(record: Any) -> Counter[str]:
    return Counter(e.name() for e in record.profiler.kineto_results.events())


def _on_device(event: Any) -> bool:
    return str(event.device_type()).endswith("CUDA") and not event.name().startswith(("Memcpy", "Memset"))
