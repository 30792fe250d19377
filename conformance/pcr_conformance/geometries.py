"""Statistics of one case, drawn as such: a block for every geometry of two gradients that a rule may meet.

What contributions rarely come to is ordinary here: exact ties, a gain of exactly 0, a boost at its cap, noise that
decides the sign of a conflict, and scales at which products of the sums leave the accumulator's range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pcr_conformance.drawing import Draw
from pcr_core import BlockStatistics

#: (|P|, |S|, cosine, sqrt of v_p, of v_s, correlation of the noise) of a block
Block = tuple[float, float, float, float, float, float]
Random = np.random.Generator


def _size(rng: Random, low: float = -1.0, high: float = 1.0) -> float:
    return float(10.0 ** rng.uniform(low, high))


def _ordinary(rng: Random, sign: float, signal: float = 1.0) -> Block:
    p, s = _size(rng), _size(rng)
    cosine = sign * float(rng.uniform(0.05, 0.95))
    noise = [x * signal * float(rng.uniform(0.1, 0.9)) for x in (p, s)]
    return p, s, cosine, noise[0], noise[1], float(rng.uniform(-0.9, 0.9))


def _tie(t: float) -> Callable[[Random], Block]:
    """S = t P, t a power of two with its sign: nothing is rounded."""

    def block(rng: Random) -> Block:
        p = float(2.0 ** rng.integers(-2, 3))
        return p, abs(t) * p, float(np.sign(t)), 0.75 * p, abs(t) * p * float(rng.choice([0.5, 0.75])), 0.5

    return block


def _debiased(sign: float) -> Callable[[Random], Block]:
    """c has one sign, and less v_ps the other; gains stay above 0."""

    def block(rng: Random) -> Block:
        p, s = _size(rng, -0.5, 0.5), _size(rng, -0.5, 0.5)
        return p, s, sign * float(rng.uniform(0.05, 0.2)), 0.8 * p, 0.7 * s, sign * float(rng.uniform(0.6, 0.95))

    return block


GEOMETRIES: dict[str, Callable[[Random], Block]] = {
    "conflict": lambda rng: _ordinary(rng, -1.0),
    "strong conflict": lambda rng: (
        _size(rng),
        _size(rng),
        -0.97,
        0.3 * _size(rng, -1, 0),
        0.2 * _size(rng, -1, 0),
        0.3,
    ),
    "no conflict": lambda rng: _ordinary(rng, 1.0),
    "little noise": lambda rng: _ordinary(rng, float(rng.choice([-1.0, 1.0])), 0.05),
    "conflict, P much longer": lambda rng: (
        100 * _size(rng),
        _size(rng, -1, 0),
        -0.6,
        30 * _size(rng, -1, 0),
        0.05,
        0.2,
    ),
    "conflict, S much longer": lambda rng: (
        _size(rng, -1, 0),
        100 * _size(rng),
        -0.6,
        0.05,
        30 * _size(rng, -1, 0),
        -0.2,
    ),
    "conflict of shared noise": _debiased(-1.0),
    "conflict hidden by noise": _debiased(1.0),
    "noise above P": lambda rng: (*_ordinary(rng, -1.0)[:3], 20.0, 0.05, 0.4),
    "noise above S": lambda rng: (*_ordinary(rng, -1.0)[:3], 0.05, 20.0, -0.4),
    "noise alone": lambda rng: (*_ordinary(rng, float(rng.choice([-1.0, 1.0])))[:3], 20.0, 30.0, 0.5),
    "noise of just |P|": lambda rng: (2.0, 1.0, -0.5, 2.0, 0.5, 0.25),
    "P certain": lambda rng: (*_ordinary(rng, -1.0)[:3], 0.0, _size(rng, -1, 0), 0.0),
    "S certain": lambda rng: (*_ordinary(rng, -1.0)[:3], _size(rng, -1, 0), 0.0, 0.0),
    "both certain": lambda rng: (*_ordinary(rng, float(rng.choice([-1.0, 1.0])))[:3], 0.0, 0.0, 0.0),
    "equally noisy": lambda rng: (1.0, _size(rng), -0.7, 0.5, 0.5, 0.5),
    "orthogonal": lambda rng: (_size(rng), _size(rng), 0.0, 0.5, 0.25, float(rng.choice([-0.5, 0.0, 0.5]))),
    "P = S": _tie(1.0),
    "P = -S": _tie(-1.0),
    "S = 4 P": _tie(4.0),
    "S = -P/2": _tie(-0.5),
    "S = -8 P": _tie(-8.0),
    "P zero": lambda rng: (0.0, _size(rng), 0.0, _size(rng), _size(rng), 0.6),
    "S zero": lambda rng: (_size(rng), 0.0, 0.0, _size(rng), _size(rng), -0.6),
    "P and its noise zero": lambda rng: (0.0, _size(rng), 0.0, 0.0, _size(rng), 0.0),
    "S and its noise zero": lambda rng: (_size(rng), 0.0, 0.0, _size(rng), 0.0, 0.0),
    "both zero, noise left": lambda rng: (0.0, 0.0, 0.0, _size(rng), _size(rng), 0.8),
    "nothing": lambda rng: (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
}

#: powers of ten of the gradients' common length: products of the sums of squares are beyond the accumulator's range
EXTREMES = {"float64": (-82, 82), "float32": (-12, 12)}


def statistics(draw: Draw, accumulator: str, *, extreme: bool = False) -> BlockStatistics[Any]:
    """A block for each of `GEOMETRIES`, in an order of its own; float64 that hold numbers of any accumulator."""
    order = draw.rng.permutation(len(GEOMETRIES))
    makers = list(GEOMETRIES.values())
    blocks = [makers[i](draw.rng) for i in order]
    unit = 10.0 ** draw.pick(EXTREMES[accumulator]) if extreme else 2.0 ** draw.integer(-20, 20)
    unit = 2.0 ** round(np.log2(unit))  # ties stay ties
    p, s, cosine, up, us, correlation = np.asarray(blocks).T
    p, s, up, us = p * unit, s * unit, up * unit, us * unit
    sizes = np.asarray([draw.pick((1, 2, 7, 1000, 10**6)) for _ in blocks], np.float64)
    return BlockStatistics(p * p, s * s, cosine * (p * s), up * up, us * us, correlation * (up * us), sizes)
