"""Assertions that say which number was off, by how much, and what was allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pcr_conformance.adapter import Adapter, seen
from pcr_conformance.cases import Case
from pcr_conformance.interval import Interval


@dataclass
class Worst:
    """The largest error / bound so far, by dtype, and of what it was."""

    dtype: str = "all"
    ratios: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)


_WORST: ContextVar[Worst | None] = ContextVar("pcr_conformance_worst", default=None)


@contextmanager
def collect() -> Iterator[Worst]:
    """Keep, while it is open, how near `close` and `near` come to what they allow."""
    worst = Worst()
    token = _WORST.set(worst)
    try:
        yield worst
    finally:
        _WORST.reset(token)


def _record(what: str, off: Any, allowed: Any) -> None:
    worst = _WORST.get()
    if worst is None:
        return
    off, allowed = np.asarray(off), np.asarray(allowed)
    judged = (allowed > 0) & np.isfinite(allowed) & np.isfinite(off)
    if judged.any():
        ratio = float((off[judged] / allowed[judged]).max())
        if ratio >= worst.ratios.get(worst.dtype, 0.0):
            worst.ratios[worst.dtype], worst.numbers[worst.dtype] = ratio, what


def as_seen(adapter: Adapter, case: Case, dtype: str) -> Case:
    """The case with its contributions rounded to the dtype in which the implementation receives them."""
    return case.with_(plasticity=seen(adapter, case.plasticity, dtype), stability=seen(adapter, case.stability, dtype))


def same_bits(law: str, what: str, got: Any, expected: Any) -> None:
    """Equal as numbers, NaN equal to NaN."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, f"{law}: {what} has shape {got.shape}, expected {expected.shape}"
    if not np.array_equal(got, expected, equal_nan=got.dtype.kind == "f"):
        i = int(np.flatnonzero(~((got == expected) | ((got != got) & (expected != expected))).ravel())[0])
        raise AssertionError(f"{law}: {what}[{i}] is {got.ravel()[i]!r}, expected exactly {expected.ravel()[i]!r}")


def close(law: str, what: str, got: Any, expected: Any, allowed: Any) -> None:
    """|got - expected| <= allowed, entry by entry; never true of NaN."""
    got, expected, allowed = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (got, expected, allowed)))
    with np.errstate(invalid="ignore"):
        _record(what, np.abs(got - expected), allowed)
    good = (np.abs(got - expected) <= allowed) | (got == expected)
    if not good.all():
        i = int(np.flatnonzero(~good.ravel())[0])
        off = abs(got.ravel()[i] - expected.ravel()[i])
        raise AssertionError(
            f"{law}: {what}[{i}] is {got.ravel()[i]!r}, expected {expected.ravel()[i]!r}: "
            f"off by {off:.3g}, allowed {allowed.ravel()[i]:.3g}"
        )


def enclosed(law: str, what: str, got: Any, exact: float, may: Interval) -> None:
    """Whether a number lies where an implementation may come to, `exact` without rounding."""
    off, value = abs(float(got) - exact), float(got)
    _record(what, off, max(may.hi - exact, exact - may.lo))  # one side alone may be a limit, such as alpha's 1
    assert may.lo <= value <= may.hi or value == exact, (
        f"{law}: {what} is {value!r}, expected {exact!r}: off by {off:.3g}, allowed {may.lo!r} to {may.hi!r}"
    )


def near(law: str, what: str, got: Any, expected: Any, allowed: float) -> None:
    """Euclidean distance of two vectors at most `allowed`."""
    off = float(np.linalg.norm(np.asarray(got) - np.asarray(expected)))
    _record(what, off, allowed)
    assert off <= allowed, f"{law}: {what} is off by {off:.3g} (norm), allowed {allowed:.3g}: {got} against {expected}"
