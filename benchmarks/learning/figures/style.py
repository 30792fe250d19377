"""How the figures look: colours that colour-blind readers tell apart (Okabe and Ito 2008), and a marker a rule."""

from __future__ import annotations

from typing import Any

from benchmarks.learning.language_model import PEERS, RULES

INK, QUIET = "#222222", "#d9dce0"
_COLOURS = ("#222222", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#8a8a8a")
_MARKERS = "osD^vPX*"


def mark(name: str) -> dict[str, Any]:
    """Colour and marker of a rule; GRPO is black everywhere."""
    names = list(RULES) if name in RULES else [next(iter(RULES)), *PEERS]
    place = names.index(name) if name in names else len(_COLOURS) - 1
    return {"color": _COLOURS[place], "marker": _MARKERS[place], "markersize": 5, "linewidth": 1.5}


def plain(axis: Any, title: str, x: str, y: str, *, grid: bool = True) -> None:
    """Title to the left, units on both axes, no box."""
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    if grid:
        axis.grid(True, color=QUIET, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
