"""Ways timed in turns, in one process, until the time is up; and copies as a unit for what reads and writes memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.gpu.context import Context, Cut
from benchmarks.measure import peak_memory
from benchmarks.update import Way

_ROUNDS = 3  # from which quartiles say something


@dataclass
class Timed:
    """Of one way.

    Attributes:
        seconds: of each round, until the device is done.
        host: of each round, until the call returns.
        memory: most bytes beyond those held before; None if not measured.
        failed: why there is nothing, if there is nothing.
        wrong: whether that is an error.
    """

    seconds: list[float]
    host: list[float]
    memory: int | None = None
    failed: str = ""
    wrong: bool = False

    def ratios(self, unit: Timed) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratios within a round."""
        found = [a / b for a, b in zip(self.seconds, unit.seconds, strict=True)]
        low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
        return low, middle, high

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def in_turns(
    context: Context, ways: Mapping[str, Way], *, rounds: int, updates: Mapping[str, int] | None = None
) -> dict[str, Timed]:
    """Each way once a round, as many rounds as asked for or as there is time for.

    Args:
        context: of the part.
        ways: each gives a context in which its job can be called.
        rounds: at most.
        updates: what one call's time is divided by, where that is not 1.

    Raises:
        Cut: there is no time for a round.
    """
    found = {name: Timed([], []) for name in ways}
    took: dict[str, float] = {}
    for name, way in ways.items():
        try:
            with way() as job:
                job()  # compiles kernels, fills the allocator's cache
                start = time.monotonic()
                if not context.toy:
                    found[name].memory = peak_memory(job, context.device)
                took[name] = time.monotonic() - start
        except torch.OutOfMemoryError:
            found[name].failed = "out of memory"
        except Exception as error:
            found[name].failed = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            found[name].wrong = True
        _collect(context)
    going = {name: way for name, way in ways.items() if not found[name].failed}
    for name in updates or {}:  # those of many updates a call are left out first
        if name in going and not context.toy and context.left() < _ROUNDS * sum(took.values()):
            del going[name], took[name]
            found[name].failed = "cut, since the time was short"
    for done in range(rounds):
        spent = sum(took.values())
        if not context.toy and context.left() < 1.2 * spent:
            if not done:
                raise Cut(f"{context.left():.0f} s are left, one round takes about {spent:.0f} s")
            break
        for name, way in going.items():
            share = 1 if updates is None else updates.get(name, 1)
            start = time.monotonic()
            with way() as job:
                wall, host = timed(job, context.device)
            took[name] = time.monotonic() - start
            found[name].seconds.append(wall / share)
            found[name].host.append(host / share)
    return found


def timed(job: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds until the device is done, and until the call returns."""
    gc.collect()
    _wait(device)
    start = time.perf_counter()
    job()
    returned = time.perf_counter()
    _wait(device)
    return time.perf_counter() - start, returned - start


def rates(
    context: Context, jobs: Mapping[str, Callable[[], object]], *, rounds: int, calls: int
) -> dict[str, list[float]]:
    """Seconds of a call by round, of short jobs in turns, some calls in a row."""

    def many(job: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                job()

        return run

    for job in jobs.values():
        job()
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for done in range(rounds):
        if done >= _ROUNDS and context.left() < 0:
            break
        for name, job in jobs.items():
            found[name].append(timed(many(job), context.device)[0] / calls)
    return found


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _collect(context: Context) -> None:
    gc.collect()
    if context.device == "cuda":
        torch.cuda.empty_cache()
