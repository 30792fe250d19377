"""Random contributions: every block has a geometry of its own, so that one case holds many.

Numbers are drawn in NumPy, so that all frameworks see the same ones. Shapes are few, because a compiled framework
compiles once a shape.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pcr_conformance.cases import Case, Floats, Integers
from pcr_conformance.drawing import Draw
from pcr_conformance.groups import group_ids

Shape = tuple[int, tuple[int, ...]]

SHARDED: Shape = (8, (16,))  # splits evenly over 2, 4, 8 or 16 devices
TWO_BLOCKS: Shape = (7, (2, 3))

#: (number of responses, sizes of the blocks): up to 35 groups of two, one block among many, the smallest of all
SHAPES: tuple[Shape, ...] = (
    TWO_BLOCKS,
    (12, (1, 4, 4, 2, 3, 1, 2, 5)),
    (24, (2, 3, 1)),
    SHARDED,
    (4, (3,)),
    (5, (1, 2, 2, 1, 3, 2, 4, 1, 2, 2, 1, 2)),
    (70, (1, 2)),
)
#: where each shape costs compilations
FEW_SHAPES: tuple[Shape, ...] = ((6, (2, 2, 2, 3)), TWO_BLOCKS)

REGIMES = (
    "free",
    "no conflict",
    "conflict",
    "orthogonal",
    "parallel",
    "antiparallel",
    "equal",
    "opposite",
    "shared noise",
    "opposed noise",
    "zero plasticity",
    "zero stability",
    "both zero",
    "nearly identical responses",
    "identical responses",
    "identical plasticity",
    "identical stability",
    "one huge response",
    "totals that cancel",
)
_INDEPENDENT = (
    "free",
    "no conflict",
    "conflict",
    "zero plasticity",
    "zero stability",
    "both zero",
    "identical responses",
)
STREAMS = ("shared", "shared", "batch", "own")


def case(
    draw: Draw,
    *,
    regimes: tuple[str, ...] = REGIMES,
    shapes: tuple[Shape, ...] = SHAPES,
    largest_exponent: int = 18,
    streams: tuple[str, ...] = ("shared",),
) -> Case:
    """A case in float64; round it to the implementation's input dtype before judging the outcome.

    `streams`: "shared" responses with groups as strata, the whole "batch" as one stratum, or a stability gradient from
    responses of its "own".
    """
    n, sizes = draw.deal("shape", shapes)
    kind = draw.deal("streams", streams)
    m = n + draw.pick((0, 3)) if kind == "own" else n
    ids = group_ids(draw, n, smallest=1 if kind == "batch" else 2)
    other = None
    if kind == "own":  # the same ids, which mean nothing to each other, or others
        other = ids.copy() if m == n and draw.coin() else group_ids(draw, m)
    allowed = tuple(r for r in regimes if kind != "own" or r in _INDEPENDENT) or ("free",)
    chosen = [draw.deal("regime", allowed), *(draw.pick(allowed) for _ in sizes[1:])]
    blocks = [_block(draw.rng, regime, size, ids, other) for regime, size in zip(chosen, sizes)]
    p, s = (np.concatenate([block[k] for block in blocks], axis=1) for k in (0, 1))
    first = draw.integer(-largest_exponent, largest_exponent)
    # scales far apart leave b at 1 or at its cap, whatever the gate and alpha are: most cases share one scale
    second = first if draw.integer(0, 2) else draw.integer(-largest_exponent, largest_exponent)
    return Case(
        p * 10.0**first,
        s * 10.0**second,
        ids,
        sizes,
        stability_group_ids=other,
        strata="batch" if kind == "batch" else "group",
        regime=", ".join(chosen),
    )


def _block(
    rng: np.random.Generator, regime: str, size: int, ids: Integers, other: Integers | None
) -> tuple[Floats, Floats]:
    noise = rng.choice([0.1, 1.0], size=2)  # two draws: noise that differs keeps alpha away from 1/2
    p, p_means = _responses(rng, ids, size, noise[0])
    s, s_means = _responses(rng, ids if other is None else other, size, noise[1])
    if regime == "parallel":
        s = p * rng.choice([0.5, 4.0, 0.3])
    elif regime == "antiparallel":
        s = p * rng.choice([-0.5, -4.0, -0.3])
    elif regime == "equal":
        s = p.copy()
    elif regime == "opposite":
        s = -p
    elif regime in ("shared noise", "opposed noise"):  # c has one sign, and less the noise that both share the other
        sign = 1.0 if regime == "shared noise" else -1.0
        z = rng.normal(size=p.shape)
        p, s = p_means * 0.3 + z, -sign * p_means * 0.1 + sign * z * rng.choice([0.5, 1.0, 2.0])
    elif regime == "orthogonal":  # disjoint supports: products are exactly zero
        p[:, size // 2 :] = 0
        s[:, : size // 2] = 0
    elif regime == "nearly identical responses":
        p, s = (means * (1 + 1e-9 * rng.normal(size=means.shape)) for means in (p_means, s_means))
    if regime.startswith("identical"):
        p = p_means if regime != "identical stability" else p
        s = s_means if regime != "identical plasticity" else s
    elif regime == "one huge response":
        p[rng.integers(len(p))] *= 1e6
        s[rng.integers(len(s))] *= 1e6
    elif regime == "totals that cancel":
        p[-1] -= p.sum(0) * (1 - 1e-7)
        s[-1] -= s.sum(0) * (1 - 1e-7)
    if regime in ("zero plasticity", "both zero"):
        p = np.zeros_like(p)
    if regime in ("zero stability", "both zero"):
        s = np.zeros_like(s)
    if regime in ("conflict", "no conflict"):
        inner = float(p.sum(0) @ s.sum(0))
        s *= (-1 if regime == "conflict" else 1) * (1 if inner >= 0 else -1)
    return p, s


def _responses(rng: np.random.Generator, ids: Integers, size: int, noise: float) -> tuple[Any, Any]:
    """Contributions about the mean of their group, and those means."""
    _, group = np.unique(ids, return_inverse=True)
    means = rng.normal(size=(int(group.max()) + 1, size))[group]
    return means + noise * rng.normal(size=means.shape), means
