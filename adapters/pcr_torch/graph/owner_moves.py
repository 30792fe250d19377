"""Owners through operations that only move elements: slices written in place, scatters, rolls, diagonals.

What such an operation's node gives back for a gradient of ones and zeros tells where elements came from: the node is
asked for one gradient of ones on every element that somebody owns, and for one a bit of the owners' numbers. An input's
element belongs to one response where each bit comes back from all that it was moved to, or from none. The ones are
small random numbers, so that operations that also subtract cannot hide a response behind another.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

MOVES = {
    "AsStrided", "ConstantPadNd", "Diagonal", "Expand", "Flip", "Gather", "Index", "IndexAdd", "IndexCopy", "IndexFill",
    "IndexPut", "IndexSelect", "Repeat", "Roll", "Rot90", "Scatter", "ScatterAdd", "Select", "SelectScatter", "Slice",
    "SliceScatter", "Take", "Unfold", "torch::autograd::CopySlices",
}  # fmt: skip
_LARGEST = 4  # of the random numbers
_EXACT = {torch.bfloat16: 2**8, torch.float16: 2**11, torch.float32: 2**24, torch.float64: 2**53}  # sums of integers

Numbers: TypeAlias = NDArray[np.int64]


def moved(node: Any, owners: Numbers, nobody: int) -> list[Numbers | None] | None:
    """Owners of each element of an operation's inputs from those of its output; None where they meet.

    Args:
        node: of the autograd graph, of an operation in `MOVES` with one output.
        owners: of its output's elements, or of its leading dimensions; numbers from 0 on.
        nobody: -1, what stands for elements that no response depends on.

    Returns:
        By input; None for one that needs no gradient.
    """
    shape = tuple(node._input_metadata[0].shape)
    whole = np.broadcast_to(owners.reshape(owners.shape + (1,) * (len(shape) - owners.ndim)), shape)
    ones = np.random.default_rng(0).integers(1, _LARGEST + 1, shape) * (whole != nobody)
    alls = _back(node, ones)
    if alls is None or any(total is not None and (total < 0).any() for total in alls):
        return None
    found = [None if total is None else np.where(total > 0, 0, nobody) for total in alls]
    for bit in range(int(owners.max(initial=0)).bit_length()):
        for mine, total, part in zip(found, alls, _back(node, ones * (whole >> bit & 1)) or (), strict=True):
            if mine is None or total is None or part is None:
                continue
            if ((part != 0) & (part != total)).any():
                return None
            mine |= ((part != 0).astype(np.int64)) << bit  # nobody's stays: all its bits are set
    return found


def _back(node: Any, ones: Numbers) -> list[Numbers | None] | None:
    """What the node gives for a gradient of small integers; None where that is not exact."""
    into = node._input_metadata[0]
    if into.dtype not in _EXACT:
        return None
    with torch.no_grad():
        gradient = torch.from_numpy(ones).to(into.device, into.dtype)
        given = node(gradient)
    found: list[Numbers | None] = []
    for part in given if isinstance(given, tuple) else (given,):
        if part is None:
            found.append(None)
            continue
        wide = part.double()
        if (wide != wide.round()).any() or (wide.abs() > min(_EXACT[into.dtype], _EXACT.get(part.dtype, 0))).any():
            return None
        found.append(wide.long().cpu().numpy())
    return found
