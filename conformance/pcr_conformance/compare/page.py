"""The comparison as one self-contained page, and as JSON."""

from __future__ import annotations

import datetime
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from string import Template
from typing import Any

from pcr_conformance.compare import conclude
from pcr_conformance.compare.measure import Agreement, Row
from pcr_conformance.compare.quantities import QUANTITIES
from pcr_conformance.compare.versions import Change, Run, changes, missing
from pcr_conformance.report import environment

SHOWN = ("dot", "plasticity_var", "stability weight", "update", "stability cotangent")
_LEAST = 1e-20  # where an error of 0 is drawn
_MARKERS = "osD^v<>P*X"
_PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>pcr comparison</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap }
td { vertical-align: top }
td.so { white-space: normal; min-width: 22rem } thead th { position: sticky; top: 0; background: #fff }
svg { width: 100%; height: auto } .wide { overflow-x: auto }
</style>
<h1>Numerical comparison</h1><p>$what</p>
<h2>Error against size</h2>
<p>Largest error over the regimes. Sums are relative to the product of the norms they are made of, weights to
themselves, the update and the cotangents in norm. Grey: one unit in the last place of float64, float32 and bfloat16. An
error of 0 is drawn at 1e-20.</p>
$plots
$changes
<h2>Every measurement</h2>
<p>Error, and in brackets the same in units of the last place: of the accumulator for sums and weights, of the input's
dtype for update and cotangents. Order: the largest change, over the quantities, when coordinates come in reverse.</p>
<p>An ulp is a unit in the last place. A conclusion says "right" where no number is off by more than 8 ulp, which sums
of this length and formulas of a few operations may be without fault.$refused</p>
<div class="wide"><table><thead><tr>$header</tr></thead><tbody>$rows</tbody></table></div>
<h2>Agreement of each two adapters</h2>
<div class="wide"><table><thead><tr>$agreement_header</tr></thead><tbody>$agreements</tbody></table></div></html>
""")


def as_json(rows: Sequence[Row], agreements: Sequence[Agreement], seed: int, day: datetime.date) -> str:
    content = {
        "date": str(day),
        "seed": seed,
        "environment": environment(),
        "rows": [asdict(row) for row in rows],
        "agreements": [asdict(each) for each in agreements],
    }
    return json.dumps(_spelled(content), indent=1, allow_nan=False) + "\n"


def as_html(
    rows: Sequence[Row], agreements: Sequence[Agreement], seed: int, day: datetime.date, before: Run | None = None
) -> str:
    """With `before`, what changed since that run comes first; ValueError where the two have nothing in common."""
    known = ", ".join(f"{name} {version}" for name, version in environment().items())
    measured = [row for row in rows if row.offered]
    columns = ("adapter", "dtype", "size", "regime", "conclusion", *QUANTITIES, "order", "bits repeat", "ms")
    pairs = ("adapters", "dtype", "size", "regime", "conclusion", *QUANTITIES)
    now = Run(str(day), seed, environment(), list(rows))
    found = {(row.adapter, row.dtype, row.size, row.regime): row for row in rows}
    return _PAGE.substitute(
        what=escape(f"{now.what()}; seed {seed}; {known}"),
        changes="" if before is None else _changes(before, now),
        plots=_plots(measured),
        refused=escape(_refused(rows)),
        header=_cells(columns, "th"),
        rows="\n".join(
            f"<tr>{_cells(_head(row), 'td')}{_so(conclude.of_row(row))}{_cells(cells(row)[4:], 'td')}</tr>"
            for row in measured
        ),
        agreement_header=_cells(pairs, "th"),
        agreements="\n".join(
            f"<tr>{_cells((f'{a.one} - {a.other}', a.dtype, f'{a.size:.0e}', a.regime), 'td')}"
            f"{_so(_agreement(a, found))}"
            f"{_cells([number(a.differences[q]) if q in a.differences else '' for q in QUANTITIES], 'td')}</tr>"
            for a in agreements
        ),
    )


def _agreement(a: Agreement, rows: dict[tuple[str, str, int, str], Row]) -> str:
    one, other = (rows[name, a.dtype, a.size, a.regime] for name in (a.one, a.other))
    return conclude.of_agreement(a, one, other)


def _changes(before: Run, after: Run) -> str:
    """Errors in both runs, and a sentence each."""
    made = changes(before, after)
    shown = [c for c in made if c.before.offered or c.after.offered]
    columns = ("adapter", "dtype", "size", "regime", "conclusion", *QUANTITIES)
    body = "\n".join(
        f"<tr>{_cells(_head(c.after), 'td')}{_so(conclude.of_change(c))}"
        f"{_cells([_both(c, q) for q in QUANTITIES], 'td')}</tr>"
        for c in shown
    )
    lost = missing(before, made)
    note = f" {lost} measurements of that run have no counterpart in this one." if lost else ""
    return (
        f"<h2>Against an earlier run</h2><p>{escape(before.what())}.{note} Errors before and after.</p>"
        f'<div class="wide"><table><thead><tr>{_cells(columns, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _refused(rows: Sequence[Row]) -> str:
    """Which inputs which adapters do not take."""
    found: dict[str, dict[str, None]] = {}
    taken = {(row.adapter, row.dtype) for row in rows if row.offered}
    for row in rows:
        if not row.offered:
            what = row.regime if (row.adapter, row.dtype) in taken else row.dtype
            found.setdefault(row.adapter, {})[what] = None
    said = "; ".join(f"{adapter} does not take {', '.join(what)}" for adapter, what in found.items())
    return f" Left out: {said}." if said else ""


def _both(change: Change, quantity: str) -> str:
    errors = [row.errors or {} for row in (change.before, change.after)]
    shown = [number(found[quantity]) if quantity in found else "-" for found in errors]
    return "" if shown == ["-", "-"] else " \u2192 ".join(shown)


def _head(row: Row) -> list[str]:
    return cells(row)[:4]


def _so(sentence: str) -> str:
    return f'<td class="so">{escape(sentence)}</td>'


def cells(row: Row) -> list[str]:
    """A row as texts: what it is of, an error for each quantity, order, whether bits repeat, and milliseconds."""
    head = [row.adapter, row.dtype, f"{row.size:.0e}", row.regime]
    if row.errors is None or row.ulps is None or row.order is None or row.seconds is None:
        return [*head, "not offered", *[""] * (len(QUANTITIES) + 2)]
    errors = [with_ulps(row.errors[q], row.ulps[q]) if q in row.errors else "" for q in QUANTITIES]
    order = number(max(row.order.values()))
    return [*head, *errors, order, "yes" if row.repeatable else "no", f"{1e3 * row.seconds:.1f}"]


def with_ulps(error: float, ulps: float) -> str:
    return f"{number(error)} ({ulps:.1f})" if 0.05 <= ulps < 1000 else f"{number(error)} ({number(ulps)})"


def number(x: float) -> str:
    return "0" if x == 0 else f"{x:.0e}"


def _cells(texts: Sequence[str], tag: str) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def _plots(rows: Sequence[Row]) -> str:
    """One figure a dtype, one panel a quantity, as inline SVG; nothing without rows."""
    from matplotlib.figure import Figure

    out = []
    adapters = list(dict.fromkeys(row.adapter for row in rows))
    for dtype in dict.fromkeys(row.dtype for row in rows):
        figure = Figure(figsize=(15, 3.6), layout="constrained")
        panels = figure.subplots(1, len(SHOWN), sharey=True)
        for axes, quantity in zip(panels, SHOWN, strict=True):
            for ulp in (2.0**-52, 2.0**-23, 2.0**-7):
                axes.axhline(ulp, color="0.85", linewidth=1, zorder=0)
            for k, adapter in enumerate(adapters):
                worst: dict[int, float] = {}
                for row in rows:
                    if row.adapter == adapter and row.dtype == dtype and row.errors and quantity in row.errors:
                        worst[row.size] = max(worst.get(row.size, _LEAST), row.errors[quantity])
                if worst:
                    sizes = sorted(worst)
                    axes.plot(
                        sizes,
                        [worst[s] for s in sizes],
                        f"C{k % 10}{_MARKERS[k % len(_MARKERS)]}-",
                        ms=5,
                        label=adapter,
                    )
            long = "tokens" if "cotangent" in quantity else "coordinates"
            axes.set(xscale="log", yscale="log", title=quantity, xlabel=long)
        panels[0].set_ylabel(f"error, {dtype} input")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
        out.append(text[text.index("<svg") :])
    return "\n".join(out)


def _spelled(x: Any) -> Any:
    """Without numbers that JSON does not know."""
    if isinstance(x, dict):
        return {key: _spelled(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_spelled(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
