"""Owner rules of operations whose effect depends on what they saved: transpositions, slices, indices, stacks.

Each gives the owners of an operation's inputs from those of its output, or None where it may mix responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
from torch import Tensor

from pcr_torch.graph.nodes import Shape, signed
from pcr_torch.graph.owner_arrays import NOBODY, Below, OwnerArrays, Owners, broadcast, spread

_Shapes: TypeAlias = Sequence[Shape | None]  # of the inputs; None for one that needs no gradient


def _transposed(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    dims = list(range(len(out)))
    one, other = signed(node._saved_dim0) % len(out), signed(node._saved_dim1) % len(out)
    dims[one], dims[other] = other, one
    return [arrays.permuted(owners, out, dims)]


def _permuted(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    return [arrays.permuted(owners, out, [signed(d) % len(out) for d in node._saved_dims])]


def _turned(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    return [arrays.permuted(owners, out, list(reversed(range(len(out)))))]


def _loss(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    """Owners through cross-entropy of (N, classes, ...), one number per row."""
    shape = shapes[0]
    if shape is None or len(shape) != len(out) + 1 or (shape[0], *shape[2:]) != out:
        return None
    wide = owners if owners.ndim == 1 else np.broadcast_to(owners[:, None], (*shape[:2], *owners.shape[1:]))
    return [arrays.fewest(wide)]


def _expanded(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    return [broadcast(owners, out, shapes[0])]


def _repeated(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    shape, lead = shapes[0], owners.ndim
    return [owners] if shape is not None and len(shape) == len(out) and shape[:lead] == out[:lead] else None


def _padded(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    changed = [len(out) - 1 - k // 2 for k, count in enumerate(node._saved_pad) if signed(count)]
    return [owners] if all(dim >= owners.ndim for dim in changed) else None


def _convolved(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    batched = owners.ndim == 1 and (shapes[0] is None or shapes[0][0] == out[0])
    return [owners, None, None][: len(shapes)] if batched else None


def _concatenated(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    dim = signed(node._saved_dim) % len(out)
    if dim >= owners.ndim or shapes == [out]:
        return [owners] * len(shapes)
    missing = out[0] - sum(s[0] for s in shapes if s is not None)
    if dim or sum(s is None for s in shapes) > 1:
        return None
    ends = np.cumsum([missing if s is None else s[0] for s in shapes])[:-1]
    return [arrays.fewest(part) for part in np.split(owners, ends)]


def _picked(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    """Owners through a selection such as x[0]: the other rows belong to nobody."""
    shape = shapes[0]
    if shape is None:
        return None
    dim = signed(node._saved_dim) % len(shape)
    if dim >= owners.ndim:
        return [owners] if shape[: owners.ndim] == out[: owners.ndim] else None
    whole = np.full(shape[: owners.ndim + 1], NOBODY)
    whole[(slice(None),) * dim + (signed(node._saved_index),)] = owners
    return [arrays.fewest(whole)]


def _stacked(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    dim = signed(node._saved_dim) % len(out)
    if dim >= owners.ndim:
        return [owners] * len(shapes)
    parts = np.moveaxis(owners, dim, 0)
    if owners.ndim == 1:  # each is one response's
        return [None if s is None or not s else np.full(s[:1], owner) for s, owner in zip(shapes, parts, strict=True)]
    return [arrays.fewest(part) for part in parts]


def _triangular(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    return [owners] if owners.ndim <= len(out) - 2 else None


def _sliced(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    shape, dim = shapes[0], signed(node._saved_dim) % len(out)
    if shape is None or dim >= owners.ndim:
        return None if shape is None else [owners]
    whole = np.full(shape[: owners.ndim], NOBODY)
    at = slice(signed(node._saved_start), signed(node._saved_end), node._saved_step)
    whole[(slice(None),) * dim + (at,)] = owners
    return [arrays.fewest(whole)]


def _indexed(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    shape, indices = shapes[0], list(node._saved_indices)
    if shape is None:
        return None
    given = [k for k, index in enumerate(indices) if index is not None]
    beside = given == list(range(given[0], given[-1] + 1))  # else what they take comes first
    if beside and given[0] >= owners.ndim:
        return [owners]
    places = _places(indices, shape)
    if places is None or owners.ndim > len(places.shape):
        return None
    rows = spread(owners, places.shape).reshape(-1)
    return [arrays.taken_back(rows, places.flat, shape[: places.depth])]


def _selected(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    shape, dim = shapes[0], signed(node._saved_dim) % len(out)
    if shape is None or dim >= owners.ndim:
        return None if shape is None else [owners]
    if dim:
        return None
    rows = spread(owners, out[: owners.ndim])
    if rows.ndim > 1:
        return None
    return [arrays.taken_back(rows, node._saved_index.cpu().numpy() % shape[0], (shape[0],))]


def _put(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    places, source = _places(list(node._saved_indices), out), shapes[1]
    if places is None or owners.ndim > places.depth:
        return None
    if source is None:
        return [owners, None]
    if source[: len(places.shape)] != places.shape:
        return None
    rows = spread(owners, out[: places.depth]).reshape(-1)[places.flat]
    return [owners, arrays.fewest(rows.reshape(places.shape))]


def _added_at(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    if signed(node._saved_dim) % len(out) or owners.ndim > 1:
        return None
    return [owners, arrays.fewest(owners[node._saved_index.cpu().numpy() % len(owners)])]


def _mask_scattered(arrays: OwnerArrays, node: Any, owners: Owners, out: Shape, shapes: _Shapes) -> Below | None:
    """Owners through masked_scatter, which puts elements in order where a mask is true: image tokens into a prompt."""
    onto, source = shapes
    if source is None:
        return [broadcast(owners, out, onto)]
    mask, of = np.broadcast_to(node._saved_mask.cpu().numpy(), out), out
    if source[-1] == out[-1] and (mask == mask[..., :1]).all():  # whole rows
        of, source, mask = out[:-1], source[:-1], mask[..., 0]
    if owners.ndim > len(of):
        return None
    chosen = spread(owners, of)[mask]
    whole = np.full(math.prod(source), NOBODY)
    whole[: len(chosen)] = chosen
    return [broadcast(owners, out, onto), arrays.fewest(whole.reshape(source))]


@dataclass(frozen=True)
class _Places:
    """What indices take: places in the flattened first `depth` dimensions, and the shape in which they come."""

    shape: Shape
    flat: Owners
    depth: int


def _places(indices: Sequence[Tensor | None], shape: Shape) -> _Places | None:
    """Places that indices of leading dimensions take; None for indices of another kind."""
    if any(index is None or index.dtype.is_floating_point for index in indices):
        return None
    arrays = [cast(Tensor, index).cpu().numpy() for index in indices]
    if any(a.dtype == bool for a in arrays):
        flat = np.flatnonzero(arrays[0])
        return _Places((len(flat),), flat, arrays[0].ndim) if len(arrays) == 1 else None
    arrays = list(np.broadcast_arrays(*(a % size for a, size in zip(arrays, shape))))
    flat = np.ravel_multi_index(tuple(arrays), shape[: len(arrays)]).reshape(-1)
    return _Places(arrays[0].shape, flat, len(arrays))


SPECIAL: dict[str, Callable[..., Below | None]] = {
    "Cat": _concatenated,
    "Select": _picked,
    "Transpose": _transposed,
    "Permute": _permuted,
    "T": _turned,
    "NllLoss": _loss,
    "NllLoss2D": _loss,
    "Expand": _expanded,
    "Repeat": _repeated,
    "ConstantPadNd": _padded,
    "Convolution": _convolved,
    "Stack": _stacked,
    "Tril": _triangular,
    "Triu": _triangular,
    "Slice": _sliced,
    "Index": _indexed,
    "IndexSelect": _selected,
    "IndexPut": _put,
    "IndexAdd": _added_at,
    "MaskedScatter": _mask_scattered,
}
