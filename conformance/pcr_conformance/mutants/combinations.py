"""Wrong updates from right weights: combined, rounded, compiled, split over devices, or written in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pcr_conformance.mutants.wrong import Decision, Mutant, combined

_C = "update_is_the_combination"


def _truncated(w: Decision, p: Any, s: Any, sizes: tuple[int, ...]) -> Any:
    """Rounded to bfloat16 by cutting the lower half of the bits off."""
    bits = combined(w, p, s, sizes).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def _first_shard(w: Decision, p: Any, s: Any, sizes: tuple[int, ...]) -> Any:
    """Every shard but the first goes without the stability gradient."""
    there = np.arange(p.shape[1]) < p.shape[1] // 2
    return combined(w, p, np.where(there, s, 0.0), sizes), True


def _contaminating(w: Decision, p: Any, s: Any, sizes: tuple[int, ...]) -> Any:
    update = combined(w, p, s, sizes)
    return update + 0 * update.sum()


def _first(w: Decision, p: Any, s: Any, sizes: tuple[int, ...]) -> Any:
    return w.plasticity[0] * p.sum(0) + w.stability[0] * s.sum(0)


def _equal_blocks(w: Decision, p: Any, s: Any, sizes: tuple[int, ...]) -> Any:
    d = sum(sizes)
    block = np.arange(d) * len(sizes) // d
    return w.plasticity[block] * p.sum(0) + w.stability[block] * s.sum(0)


def _without(x: Any, least: float) -> Any:
    return np.where(np.abs(x) < least, 0.0, x)


COMBINATIONS: tuple[Mutant, ...] = (
    Mutant("bfloat16 by truncation", "bfloat16_is_widened_first", "combine", _truncated),
    Mutant("a and b swapped", _C, "combine", lambda w, p, s, n: combined(w, s, p, n)),
    Mutant("mean over responses", _C, "combine", lambda w, p, s, n: combined(w, p, s, n) / len(p)),
    Mutant("first block's weights for all", _C, "combine", lambda w, p, s, n: _first(w, p, s, n)),
    Mutant("absolute update", "rotation_goes_through", "combine", lambda w, p, s, n: np.abs(combined(w, p, s, n))),
    Mutant(
        "last response counts twice",
        "order_does_not_matter",
        "combine",
        lambda w, p, s, n: combined(w, p, s, n) + p[-1],
    ),
    Mutant(
        "half precision out",
        "dtype_and_device_come_back",
        "combine",
        lambda w, p, s, n: combined(w, p, s, n).astype(np.float32),
    ),
    Mutant("NaN spreads to other blocks", "non_finite_is_never_hidden", "combine", _contaminating),
    Mutant("what is written not judged", "finite_tells_what_is_written", "judgement", combined),
    Mutant(
        "compiled drops digits",
        "compiled_equals_eager",
        "compile",
        lambda w, p, s, n: combined(w, p, s, n) * (1 + 1e-5),
    ),
    Mutant("sharding lost", "sharded_equals_one_device", "sharded", lambda w, p, s, n: (combined(w, p, s, n), False)),
    Mutant("stability on the first shard only", "sharded_equals_one_device", "sharded", _first_shard),
    Mutant(
        "in place into a copy",
        "in_place_equals_out_of_place",
        "in place",
        lambda w, p, s, n: (combined(w, p, s, n), False),
    ),
    Mutant(
        "in place on top of the old gradient",
        "in_place_equals_out_of_place",
        "in place",
        lambda w, p, s, n: (p.sum(0) + combined(w, p, s, n), True),
    ),
    Mutant(
        "combined in float32",
        _C,
        "combine",
        lambda w, p, s, n: combined(w, p, s, n).astype(np.float32).astype(np.float64),
    ),
    Mutant("S summed over all but the last", _C, "combine", lambda w, p, s, n: combined(w, p, s[:-1], n)),
    Mutant(
        "update where b is capped at 100",
        _C,
        "combine",
        lambda w, p, s, n: combined(replace(w, stability=np.minimum(w.stability, 100.0)), p, s, n),
    ),
    Mutant(
        "last block without S",
        _C,
        "combine",
        lambda w, p, s, n: combined(
            replace(w, stability=np.where(np.arange(len(n)) == len(n) - 1, 0.0, w.stability)), p, s, n
        ),
    ),
    Mutant("blocks of equal size", _C, "combine", _equal_blocks),
    Mutant(
        "weights of the block before",
        _C,
        "combine",
        lambda w, p, s, n: combined(replace(w, stability=np.roll(w.stability, 1)), p, s, n),
    ),
    Mutant("small updates are zero", _C, "combine", lambda w, p, s, n: _without(combined(w, p, s, n), 1e-8)),
    Mutant("update clipped", _C, "combine", lambda w, p, s, n: np.clip(combined(w, p, s, n), -1e6, 1e6)),
    Mutant(
        "NaN written as zero",
        "non_finite_is_never_hidden",
        "combine",
        lambda w, p, s, n: np.nan_to_num(combined(w, p, s, n), posinf=np.inf, neginf=-np.inf),
    ),
)
