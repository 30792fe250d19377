"""Draws the pictures of the pages, from what pcr_core computes: `python docs/pictures.py` writes docs/*.svg anew.

The tests hold the committed files against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

import pcr_core as pcr

Vector: TypeAlias = NDArray[np.float64]
Point: TypeAlias = Sequence[float] | Vector

FOLDER = Path(__file__).parent
WIDTH, HEIGHT, SCALE = 336, 300, 94
INK, GREY = "#222", "#8a8a8a"
ALPHA, PRIME, MINUS = "&#945;", "&#8242;", "&#8722;"
PLASTICITY, STABILITY, PCR, OTHER = "#c2410c", "#1d4ed8", "#047857", "#6b7280"

P, S = np.asarray([-1.6, 1.5]), np.asarray([1.2, 0.0])
NOISE_P, NOISE_S = 0.15, 0.10  # v_p and v_s: traces of the totals' noise, so that alpha is 0.6


def two_responses() -> tuple[Vector, Vector]:
    """Contributions (2, 2) of two responses to one prompt, whose sums are P and S and whose scatter is the noise."""
    # scatter of (T/2 + d, T/2 - d): 2 (|d|^2 + |d|^2) = 4 |d|^2
    p = np.asarray([0.0, np.sqrt(NOISE_P) / 2])
    s = np.asarray([np.sqrt(NOISE_S) / 2, 0.0])
    return np.stack([P / 2 + p, P / 2 - p]), np.stack([S / 2 + s, S / 2 - s])


def resolved(rule: pcr.Rule) -> pcr.Resolution[Vector]:
    plasticity, stability = two_responses()
    return pcr.resolve(plasticity, stability, group_ids=np.asarray([0, 0]), rule=rule)


def picture(title: str, parts: Iterable[str]) -> str:
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{title}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(at: Point, words: str, colour: str = INK, anchor: str = "start", shift: tuple[float, float] = (0, 0)) -> str:
    x, y = at[0] + shift[0], at[1] + shift[1]
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def line(start: Point, end: Point, colour: str, width: float = 1, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"{dashed}/>'
    )


def arrow(start: Vector, end: Vector, colour: str, width: float = 2.5) -> str:
    along = (end - start) / np.linalg.norm(end - start)
    across = np.asarray([-along[1], along[0]])
    neck = end - 11 * along
    head = " ".join(f"{x:.1f},{y:.1f}" for x, y in (end, neck + 5 * across, neck - 5 * across))
    return line(start, neck, colour, width) + f'<polygon points="{head}" fill="{colour}"/>'


def canvas(point: Point) -> Vector:
    """Coordinates of the plane of P and S, on the page."""
    return np.asarray([WIDTH * 0.575 + SCALE * point[0], HEIGHT * 0.75 - SCALE * point[1]])


def cloud(total: Vector, trace: float, colour: str) -> str:
    x, y = canvas(total)
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{SCALE * np.sqrt(trace / 2):.1f}" fill="{colour}" fill-opacity="0.16"/>'
    )


def projection() -> str:
    """P, S, and what is left of P for alpha 0, 0.6 and 1."""
    origin = canvas((0, 0))
    soft = resolved(pcr.PCR(alpha="variance", update="literal"))
    hard = resolved(pcr.PCR(alpha=1.0, update="literal"))
    alpha = float(soft.weights.alpha[0])
    left = canvas(soft.update)
    return picture(
        "The soft projection of P, in conflict with S",
        [
            cloud(P, float(soft.statistics.plasticity_var[0]), PLASTICITY),
            cloud(S, float(soft.statistics.stability_var[0]), STABILITY),
            line(canvas((-1.85, 0)), canvas((1.38, 0)), GREY, 1, "3 4"),
            line(canvas(P), canvas(hard.update), GREY, 1.5, "5 4"),
            arrow(origin, canvas(S), STABILITY),
            arrow(origin, canvas(P), PLASTICITY),
            arrow(origin, canvas(hard.update), OTHER),
            arrow(origin, left, PCR),
            text(canvas(S), "S", STABILITY, "end", shift=(-8, 22)),
            text(canvas(P), f"P, {ALPHA} = 0", PLASTICITY, shift=(-8, -32)),
            text(left, f"P{PRIME}, {ALPHA} = {alpha:.1f}", PCR, "middle", shift=(0, -10)),
            text(canvas(hard.update), f"{ALPHA} = 1", OTHER, shift=(8, -10)),
            text((12, HEIGHT - 14), "dashed: P's part against S; circles: noise"),
        ],
    )


def updates() -> str:
    """The update for the same three."""
    origin = canvas((0, 0))
    names: dict[str, pcr.Rule] = {"GRPO": pcr.GRPO(), "PCR": pcr.PCR(alpha="variance"), "hard": pcr.HardProjection()}
    colours = {"GRPO": PLASTICITY, "PCR": PCR, "hard": OTHER}
    results = {name: resolved(rule) for name, rule in names.items()}
    arrows = [arrow(origin, canvas(results[name].update), colours[name]) for name in ("GRPO", "hard", "PCR")]
    words = []
    for name, result in results.items():
        x, y = canvas(result.update)
        words.append(text((x, y - 28), name, colours[name], "middle"))
        words.append(text((x, y - 12), f"b = {float(result.weights.stability[0]):.1f}", colours[name], "middle"))
    return picture(
        "The update u = P + b S of three rules",
        [
            line(canvas((-1.85, 0)), canvas((1.38, 0)), GREY, 1, "3 4"),
            line(canvas(P), canvas(results["hard"].update), GREY, 1.5, "5 4"),
            arrow(origin, canvas(S), STABILITY, 1.5),
            arrow(origin, canvas(P), PLASTICITY, 1.5),
            *arrows,
            *words,
            text(canvas(S), "S", STABILITY, "end", shift=(-8, 22)),
            text(canvas(P), "P", PLASTICITY, shift=(-2, -12)),
            text((12, HEIGHT - 14), "all of them end on one line, along S"),
        ],
    )


def caps() -> str:
    """Movement along S against beta: without a cap the smallest KL gradient stops P, with one it fades with beta."""
    betas = np.geomspace(1e-3, 1.0, 61)
    against = float(P @ S) / float(np.linalg.norm(S))
    left, right, top, bottom = 52.0, WIDTH - 14.0, 22.0, HEIGHT - 62.0
    lowest, highest = -1.8, 1.2

    def place(beta: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * (np.log10(beta) + 3) / 3
        return x, bottom - (bottom - top) * (value - lowest) / (highest - lowest)

    def curve(rule: pcr.Rule, colour: str, dashes: str = "") -> str:
        one = np.ones_like(betas)
        length = float(np.linalg.norm(S)) * betas
        weights = rule(
            pcr.BlockStatistics(one * float(P @ P), length**2, against * length, one, 0 * one, 0 * one, 2 * one)
        )
        along = weights.plasticity * against + weights.stability * length
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, betas, along))
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"{dashed}/>'

    ticks = []
    for power in range(-3, 1):
        x, y = place(10.0**power, lowest)
        ticks += [line((x, y), (x, y + 5), GREY), text((x, y + 19), f"{10.0**power:g}", INK, "middle")]
    for value in (-1.0, 0.0, 1.0):
        x, y = place(1e-3, value)
        ticks += [
            line((x, y), (right, y), "#e5e5e5"),
            text((x - 8, y + 4), f"{value:g}".replace("-", MINUS), INK, "end"),
        ]
    return picture(
        "Movement along S against beta, with and without a cap",
        [
            *ticks,
            line((left, bottom), (right, bottom), GREY),
            line((left, top), (left, bottom), GREY),
            curve(pcr.HardProjection(), OTHER),
            curve(pcr.GRPO(), PLASTICITY),
            curve(pcr.PCR(alpha=1.0, max_boost=10.0), PCR),
            curve(pcr.PCR(alpha=1.0, max_boost=3.0), PCR, "2 3"),
            text(place(1.3e-3, 0.09), "no cap", OTHER),
            text(place(1.25e-2, -1.08), "cap 10", PCR, "end"),
            text(place(0.27, -0.62), "cap 3", PCR),
            text(place(2.3e-1, -1.68), "GRPO", PLASTICITY),
            text(((left + right) / 2, bottom + 34), "&#946;", INK, "middle"),
            text((12, HEIGHT - 8), "part of the update along S, for one fixed P"),
        ],
    )


PICTURES: dict[str, Callable[[], str]] = {"projection.svg": projection, "updates.svg": updates, "caps.svg": caps}


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
