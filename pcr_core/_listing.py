"""What was chosen as blocks, what was left out and why, as text: the same for every adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from pcr_core._structure import OUTSIDE, UNCLEAR, VECTOR, Parameter
from pcr_core._words import NORM


def listing(rows: Iterable[tuple[str, tuple[int, ...], str]]) -> str:
    """A table of (name, shape, what became of it), one line for what differs in indices alone.

    Example:
        >>> print(listing([("h.0.up", (4, 2), "chosen"), ("h.1.up", (4, 2), "chosen"), ("head", (9, 2), "left out")]))
        parameters  tensors  shape  blocks
        h.*.up      2        4x2    chosen
        head        1        9x2    left out
    """
    counts: dict[tuple[str, str, str], int] = {}
    for name, shape, what in rows:
        key = re.sub(r"(?<=[./_])\d+(?=[./])", "*", name), "x".join(map(str, shape)), what
        counts[key] = counts.get(key, 0) + 1
    table = [("parameters", "tensors", "shape", "blocks")]
    table += [(kind, str(count), shape, what) for (kind, shape, what), count in counts.items()]
    widths = [max(len(row[k]) for row in table) for k in range(3)]
    return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3]]) for row in table)


def not_selected(blocks: Any, reason: str | None) -> str:
    """Why a selector leaves a parameter out; `reason` is that of "mlp"."""
    if blocks == "mlp":
        return str(reason)
    return f"{blocks!r} does not match" if isinstance(blocks, str) else "the callable leaves it out"


def cannot_tell(parameters: Sequence[Parameter], reasons: Sequence[str | None], separator: str) -> str:
    """What of "mlp" is unclear, with the matrices that could be meant; empty where nothing is.

    Args:
        separator: between the attributes of a parameter's name.
    """
    unclear = [p for p, why in zip(parameters, reasons) if why == UNCLEAR]
    if not unclear:
        return ""
    layers = [(p.path[: len(p.above) + 1], (*p.path, p.leaf)[len(p.above) + 1 :], p.shape) for p in unclear]
    first = layers[0][0]
    names = {separator.join(name): shape for layer, name, shape in layers if layer == first}
    listed = ", ".join(f"{name} ({'x'.join(map(str, shape))})" for name, shape in names.items())
    wide = [s for s in names.values() if len(s) == 2 and s != s[::-1] and s[::-1] in names.values()]
    example = ""
    if wide:
        largest = max(wide, key=lambda shape: shape[0] * shape[1])
        some = [re.escape(name) for name, shape in names.items() if shape in (largest, largest[::-1])]
        above = re.sub(r"\d+$", lambda _: r"\d+", re.escape(separator.join(first[-2:])))
        example = f", for example blocks=r'{above}{re.escape(separator)}({'|'.join(some)})$'"
    return (
        f"blocks: 'mlp' cannot tell attention from an MLP where matrices have numbers for names "
        f"({len({layer for layer, _, _ in layers})} layers). In {separator.join(first)}: {listed}. Say which are the "
        f"MLP's{example}; or put the MLP into a module called mlp"
    )


def candidates(parameters: Sequence[Parameter], reasons: Sequence[str | None], families: Sequence[str]) -> str:
    """Why "mlp" found nothing, and what a regular expression could name instead."""
    inside = [
        (p, family) for p, why, family in zip(parameters, reasons, families) if p.layer and why not in (VECTOR, NORM)
    ]
    layers = {parameter.path[: len(parameter.above) + 1] for parameter, _ in inside}
    why = sorted({why for p, why in zip(parameters, reasons) if p.layer and why not in (None, VECTOR, NORM, OUTSIDE)})
    matrices = sorted({family for _, family in inside})
    if not matrices:
        return ""
    some = "|".join([name for name in matrices if name.endswith("_proj")][:2] or matrices[:1])
    return (
        f" Its {len(layers)} layers have no MLP that is told by its structure ({', '.join(why)}); a regular expression "
        f"can say what to take. Their matrices are called {', '.join(matrices[:8])}; for example blocks={some!r}."
    )
