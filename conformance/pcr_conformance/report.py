"""Verdicts for people and for machines: a table, JUnit, JSON, one HTML page, and a line for a README."""

from __future__ import annotations

import datetime
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from importlib.metadata import version
from importlib.util import find_spec
from string import Template
from typing import Any
from xml.etree import ElementTree

import numpy as np

import pcr_core
from pcr_conformance.levels import LEVELS
from pcr_conformance.verdict import Verdict

_PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>pcr conformance</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #ddd }
.passed { color: #176b2c } .failed, .xpassed { color: #b00020; font-weight: 600 } .xfailed, .skipped { color: #666 }
pre { white-space: pre-wrap; background: #f5f5f5; padding: .7rem }
</style>
<h1>Conformance</h1><p>$badge</p><p>$nearest</p><p>$environment</p>
<table><thead><tr><th>adapter</th><th>library</th><th>device, mode</th><th>law</th><th>level</th><th>dtype</th>
<th>worst error / bound</th><th>examples</th><th>verdict</th></tr></thead><tbody>$rows</tbody></table>$failures$untried
</html>
""")


def levels(verdicts: Sequence[Verdict]) -> list[str]:
    """Levels of which some law ran and every law passed on every adapter that it is for."""
    out = []
    for level in LEVELS:
        ran = [v for v in verdicts if v.level == level and v.outcome != "skipped"]
        if ran and all(v.outcome == "passed" for v in ran):
            out.append(level)
    return out


def worst(verdicts: Sequence[Verdict]) -> float:
    """The largest error / bound of all, NaN where none was measured."""
    ratios = [ratio for v in verdicts for ratio in v.worst.values()]
    return max(ratios) if ratios else math.nan


def nearest(verdicts: Sequence[Verdict]) -> list[str]:
    """For each dtype the bound that some adapter came nearest to: what was judged, in which law and where.

    Near 1 is what rounding once to a dtype comes to; in a law that rounds nothing it calls for a look at the bound.
    """
    found: dict[str, tuple[float, str]] = {}
    for v in verdicts:
        for dtype, ratio in v.worst.items():
            if ratio >= found.get(dtype, (0.0, ""))[0]:
                what = v.nearest.get(dtype, "")
                found[dtype] = ratio, f"{what} in {v.law} on {v.adapter}".strip()
    return [f"nearest bound, {dtype}: {ratio:.3g} of it, {where}" for dtype, (ratio, where) in found.items()]


def badge(verdicts: Sequence[Verdict], day: datetime.date) -> str:
    """For a README: which levels hold, on what, when it was checked, and how near the bounds it came."""
    return (
        f"pcr conformance: {'+'.join(levels(verdicts)) or 'none'}, {places(verdicts)}, {day}, "
        f"worst error/bound {worst(verdicts):.3g}"
    )


def places(verdicts: Sequence[Verdict]) -> str:
    """What was checked, where and how: "torch 2.11.0 on cpu (eager, jit)", by library and device."""
    modes: dict[str, dict[str, None]] = {}
    for v in verdicts:
        modes.setdefault(f"{v.software or v.adapter} on {v.device}", {})[v.mode] = None
    return "; ".join(f"{where} ({', '.join(how)})" for where, how in modes.items())


def environment() -> dict[str, str]:
    """Versions, of the array libraries that are installed too."""
    libraries = ("array-api-compat", "torch", "jax")
    installed = {name: version(name) for name in libraries if find_spec(name.replace("-", "_")) is not None}
    return {
        "pcr": pcr_core.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        **installed,
    }


def rows(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """One row for each adapter (which has a device and a mode), law and dtype."""
    out: list[tuple[str, ...]] = []
    for v in verdicts:
        for dtype, ratio in v.worst.items() or (("", math.nan),):
            near = "" if math.isnan(ratio) else f"{ratio:.3g}"
            out.append(
                (
                    v.adapter,
                    v.software,
                    f"{v.device}, {v.mode}",
                    v.law,
                    v.level,
                    dtype,
                    near,
                    str(v.examples),
                    v.outcome,
                )
            )
    return out


def as_json(verdicts: Sequence[Verdict], day: datetime.date, seed: int) -> str:
    ratio = worst(verdicts)
    content: dict[str, Any] = {
        "date": str(day),
        "seed": seed,
        "environment": environment(),
        "levels": levels(verdicts),
        "worst_error_over_bound": None if math.isnan(ratio) else _finite(ratio),
        "nearest_bounds": nearest(verdicts),
        "verdicts": [asdict(v) | {"worst": {k: _finite(r) for k, r in v.worst.items()}} for v in verdicts],
    }
    return json.dumps(content, indent=1, allow_nan=False)


def _finite(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)


def as_junit(verdicts: Sequence[Verdict]) -> str:
    suite = ElementTree.Element(
        "testsuite",
        name="pcr_conformance",
        tests=str(len(verdicts)),
        failures=str(sum(v.bad for v in verdicts)),
        skipped=str(sum(v.outcome in ("skipped", "xfailed") for v in verdicts)),
    )
    properties = ElementTree.SubElement(suite, "properties")
    for adapter, where in {v.adapter: f"{v.software}, {v.device}, {v.mode}" for v in verdicts}.items():
        ElementTree.SubElement(properties, "property", name=adapter, value=where.removeprefix(", "))
    for v in verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname=v.adapter, name=v.law, time=f"{v.seconds:.3f}")
        if v.bad:
            ElementTree.SubElement(case, "failure", message=v.message.split("\n")[0]).text = v.message
        elif v.outcome != "passed":
            ElementTree.SubElement(case, "skipped", message=v.message.split("\n")[0])
        elif v.message:
            ElementTree.SubElement(case, "system-out").text = v.message
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def _untried(v: Verdict) -> bool:
    """Whether a law was skipped, or passed on some problems and was not asked on others."""
    return bool(v.message) and v.outcome in ("passed", "skipped")


def as_html(verdicts: Sequence[Verdict], day: datetime.date) -> str:
    body = []
    for *cells, outcome in rows(verdicts):
        plain = "".join(f"<td>{escape(c)}</td>" for c in cells)
        body.append(f'<tr>{plain}<td class="{outcome}">{outcome}</td></tr>')
    failures = "".join(
        f"<h2>{v.law} on {escape(v.adapter)}</h2><pre>{escape(v.message)}</pre>" for v in verdicts if v.bad
    )
    untried = "".join(f"<li>{v.law} on {escape(v.adapter)}: {escape(v.message)}" for v in verdicts if _untried(v))
    known = ", ".join(f"{k} {v}" for k, v in environment().items())
    return _PAGE.substitute(
        badge=escape(badge(verdicts, day)),
        nearest="<br>".join(escape(line) for line in nearest(verdicts)),
        environment=escape(known),
        rows="\n".join(body),
        failures=failures,
        untried=f"<h2>Not tried</h2><ul>{untried}</ul>" if untried else "",
    )
