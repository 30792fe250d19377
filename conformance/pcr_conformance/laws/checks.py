"""Assertions that say which number was off, by how much, and what was allowed."""

from __future__ import annotations

from typing import Any

import numpy as np

from pcr_conformance.adapter import Adapter, seen
from pcr_conformance.cases import Case


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
    good = (np.abs(got - expected) <= allowed) | (got == expected)
    if not good.all():
        i = int(np.flatnonzero(~good.ravel())[0])
        off = abs(got.ravel()[i] - expected.ravel()[i])
        raise AssertionError(
            f"{law}: {what}[{i}] is {got.ravel()[i]!r}, expected {expected.ravel()[i]!r}: "
            f"off by {off:.3g}, allowed {allowed.ravel()[i]:.3g}"
        )


def near(law: str, what: str, got: Any, expected: Any, allowed: float) -> None:
    """Euclidean distance of two vectors at most `allowed`."""
    off = float(np.linalg.norm(np.asarray(got) - np.asarray(expected)))
    assert off <= allowed, f"{law}: {what} is off by {off:.3g} (norm), allowed {allowed:.3g}: {got} against {expected}"
