"""What a reader should conclude from a row of the comparison, in one sentence."""

from __future__ import annotations

import math

from pcr_conformance.compare.measure import Agreement, Row
from pcr_conformance.compare.versions import Change

#: units in the last place that a sum of many terms, and a formula of a few operations, may lose without fault
ROUNDING = 8.0


def of_row(row: Row) -> str:
    """How far the numbers can be trusted, what the order of coordinates does, and whether bits repeat.

    Example:
        >>> of_row(Row("numpy", "float16", 10, "conflict", offered=False))
        'The adapter takes no such input.'
    """
    if row.errors is None or row.ulps is None or row.order is None:
        return "The adapter takes no such input."
    lost = [name for name, error in row.errors.items() if not math.isfinite(error)]
    if lost:
        return f"Not usable here: {_listed(lost)} came out as no finite number."
    worst = max(row.ulps, key=row.ulps.__getitem__)
    moved = max(row.order, key=row.order.__getitem__)
    repeats = "" if row.repeatable else "; two runs gave different bits"
    if row.ulps[worst] <= ROUNDING:
        order = (
            "whatever the order of the coordinates" if row.order[moved] == 0 else "in either order of the coordinates"
        )
        return f"Right to {_units(row.ulps[worst])} in every number, {order}{repeats}."
    off = f"Of {worst} no more than {_digits(row.errors[worst])} digits are right ({_units(row.ulps[worst])} off)"
    if row.order.get(worst, 0.0) >= row.errors[worst] / 10:
        return f"{off}, and another order of the coordinates changes those after them: long sums lose digits{repeats}."
    return f"{off}, in either order of the coordinates{repeats}."


def of_agreement(agreement: Agreement, one: Row, other: Row) -> str:
    """Whether one adapter can stand in for the other, and if not, which of them is off."""
    if one.digest and one.digest == other.digest:
        return "The same bits."
    worst = max(agreement.differences, key=agreement.differences.__getitem__)
    found = f"they differ by at most {agreement.differences[worst]:.0e}, in {worst}"
    off = [row.adapter for row in (one, other) if row.ulps and max(row.ulps.values()) > ROUNDING]
    if not off:
        return f"Interchangeable: {found}, which is rounding."
    return f"Not interchangeable to the last digits: {found}; off from the reference: {_listed(off)}."


def of_change(change: Change) -> str:
    """What became of an adapter's numbers between two runs."""
    before, after = change.before.ulps, change.after.ulps
    if before is None or after is None:
        if change.before.offered == change.after.offered:
            return "Taken by neither."
        return "Not taken before, and now it is." if change.after.offered else "Taken before, and no more."
    if change.before.digest and change.before.digest == change.after.digest:
        return "Nothing changed: the same bits."
    if max(before.values()) <= ROUNDING and max(after.values()) <= ROUNDING:
        return "Other bits, as good: every number is right to rounding in both."
    factor = {name: after[name] / max(before[name], ROUNDING) for name in after if name in before}
    worst = max(factor, key=factor.__getitem__)
    if factor[worst] > 2:
        return f"Worse: {worst} went from {_units(before[worst])} off to {_units(after[worst])}."
    gain = {name: before[name] / max(after[name], ROUNDING) for name in factor}
    best = max(gain, key=gain.__getitem__)
    if gain[best] > 2:
        return f"Better: {best} went from {_units(before[best])} off to {_units(after[best])}."
    return "Other bits, about as good as before."


def _units(ulps: float) -> str:
    """Of the last place: one digit where there are few, a power of ten where there are many."""
    shown = f"{ulps:.1f}" if ulps < 1000 else f"{ulps:.0e}"
    return f"{shown} ulp"


def _digits(error: float) -> int:
    return max(0, math.floor(-math.log10(error))) if error > 0 else 16


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
