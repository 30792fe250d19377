"""Group structures: how many responses share a prompt, what the groups are called, and in which order they come."""

from __future__ import annotations

import numpy as np

from pcr_conformance.cases import Integers
from pcr_conformance.drawing import Draw

PARTITIONS = ("random", "pairs", "one group", "one large group", "halves")

MOST = 36  # groups

#: ids are labels: negative, far apart, alike in their lowest bits, in absolute value or as float32
NAMES: dict[str, tuple[int, ...]] = {
    "consecutive": tuple(range(MOST)),
    "scattered": tuple((k * 7919 + 7) % 1009 - 300 for k in range(MOST)),
    "absolute value": tuple(x for k in range(MOST // 2) for x in (k * k + 1, -k * k - 1)),
    "lowest 8 bits": tuple(3 + 256 * k for k in range(-MOST // 2, MOST // 2)),
    "lowest 16 bits": tuple(5 + 65_536 * k for k in range(-MOST // 2, MOST // 2)),
    "as float32": tuple(2**24 + k for k in range(MOST)),
    "limits": tuple(x for k in range(MOST // 2) for x in (2**31 - 1 - k, -(2**31) + k)),
    "remainders": tuple(1 + 7 * k for k in range(MOST)),
}
ORDERS = ("mixed", "sorted", "reversed", "interleaved")


def group_ids(draw: Draw, n: int, *, smallest: int = 2) -> Integers:
    """Ids of n responses in groups of two or more, or of at least `smallest`."""
    sizes = partition(draw, n, smallest)
    names = list(NAMES[draw.deal("names", tuple(NAMES))])
    start = draw.integer(0, len(names) - 1)
    chosen = (names[start:] + names[:start])[: len(sizes)]
    ids = np.repeat(np.asarray(chosen, dtype=np.int64), sizes)
    order = draw.deal("order", ORDERS)
    if order == "mixed":
        return draw.rng.permutation(ids)
    if order == "interleaved":
        within = np.concatenate([np.arange(size) for size in sizes])
        return ids[np.argsort(within, kind="stable")]
    return ids[::-1].copy() if order == "reversed" else ids


def partition(draw: Draw, n: int, smallest: int = 2) -> list[int]:
    """Sizes of the groups, at most `MOST` of them."""
    kind = draw.deal("partition", PARTITIONS)
    if kind == "one group" or n < 2 * smallest:
        return [n]
    if kind == "halves":
        return [n // 2, n - n // 2]
    pairs = min((n - n % 2) // 2, MOST)
    if kind == "pairs":
        return [2] * (pairs - 1) + [n - 2 * (pairs - 1)]
    if kind == "one large group":
        small = draw.integer(1, min(9, n // 2 - 1))
        sizes = [n - 2 * small] + [2] * small
        return sizes if draw.coin() else sizes[::-1]
    sizes, left = [], n
    while left:
        room = [m for m in range(smallest, left + 1) if m == left or left - m >= smallest]
        sizes.append(left if len(sizes) == MOST - 1 else draw.pick(room))
        left -= sizes[-1]
    return sizes
