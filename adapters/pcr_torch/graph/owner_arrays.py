"""Arrays of owners: which response each row of an activation belongs to, and what operations make of such an array.

An owner array has the leading dimensions of an activation, as few as tell: (n,) for (n, tokens, features), and
(n * tokens,) for flattened rows. `NOBODY` owns rows that no log-probability depends on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from torch.autograd.graph import Node

from pcr_torch.graph.nodes import Shape, kind_of

NOBODY = -1
Owners: TypeAlias = NDArray[np.int64]
Below: TypeAlias = "Sequence[Owners | str | None]"  # by input: owners; why there are none; None: has no rows


class OwnerArrays:
    """Owners of an operation's input from those of its output, for what operations do to shapes.

    Equal arrays come out as one object where they can be told cheaply, so that what is cached by identity is found.

    Args:
        n: responses.
    """

    def __init__(self, n: int) -> None:
        self.responses: Owners = np.arange(n)
        self._views: dict[tuple[int, Shape, Shape], tuple[Owners, Owners | str]] = {}

    def fewest(self, owners: Owners) -> Owners:
        """An owner array without trailing dimensions along which owners are the same."""
        while owners.ndim > 1 and owners.shape[-1] and bool((owners == owners[..., :1]).all()):
            owners = owners[..., 0]
        return self.responses if np.array_equal(owners, self.responses) else owners

    def of_items(self, owners: Owners) -> Owners | None:
        """Owners by the first dimension alone; None where the others hold rows of several responses."""
        if owners.ndim == 1:
            return None
        flat = owners.reshape(len(owners), -1)
        only = flat.max(axis=1)  # NOBODY is below all
        return self.fewest(only) if ((flat == only[:, None]) | (flat == NOBODY)).all() else None

    def reshaped(self, owners: Owners, out: Shape, shape: Shape) -> Owners | str:
        """Owners through a view: elements keep their order, so rows do where leading dimensions hold as many."""
        if shape[: owners.ndim] == owners.shape:
            return owners
        key = (id(owners), out, shape)
        if key not in self._views:
            self._views[key] = (owners, self._view(owners, out, shape))
        return self._views[key][1]

    def _view(self, owners: Owners, out: Shape, shape: Shape) -> Owners | str:
        for m in range(owners.ndim, len(out) + 1):
            count = math.prod(out[:m])
            for k in range(1, len(shape) + 1):
                if math.prod(shape[:k]) == count:
                    return self.fewest(spread(owners, out[:m]).reshape(shape[:k]))
        return "a view in which rows are not contiguous"

    def permuted(self, owners: Owners, out: Shape, dims: list[int]) -> Owners:
        """Owners through a permutation: dimension j of the output is dimension dims[j] of the input."""
        mine = dims[: owners.ndim]
        if mine == list(range(owners.ndim)):
            return owners
        depth = max(mine) + 1
        there = [out[dims.index(d)] for d in range(depth)]
        placed = owners.transpose(np.argsort(mine)).reshape([there[d] if d in mine else 1 for d in range(depth)])
        return self.fewest(np.broadcast_to(placed, there))

    def along(self, dims: list[int], owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> Below | None:
        """Owners through an operation along dimensions; it may mix rows of one response (time-major order)."""
        lead, mixed = owners.ndim, tuple(dim for dim in dims if dim < owners.ndim)
        if any(s is not None and [*_without(s, mixed, lead)] != [*_without(out, mixed, lead)] for s in shapes):
            return None
        if mixed:
            only = owners.max(axis=mixed, keepdims=True)  # NOBODY is below all
            if not ((owners == only) | (owners == NOBODY)).all():
                return None
            owners = only
        return [None if s is None else self.fewest(np.broadcast_to(owners, s[:lead])) for s in shapes]

    def reduced(self, dims: list[int], owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> Below | None:
        """Owners through a reduction: all that was summed belongs to the response of the sum."""
        shape = shapes[0]
        if shape is None:
            return None
        for dim in sorted(dims) if len(out) < len(shape) else ():
            if dim <= owners.ndim:
                owners = np.expand_dims(owners, dim)
        return [self.fewest(np.broadcast_to(owners, shape[: owners.ndim]))]

    def matrix(self, owners: Owners, shapes: Sequence[Shape | None], k: int) -> Below | None:
        """Owners through a product of input number `k` with a matrix that all rows share."""
        shape = shapes[k]
        if shape is not None and (shape[: owners.ndim] != owners.shape or len(shape) == owners.ndim):
            return None
        return [owners if j == k else None for j in range(len(shapes))]

    def batched(self, first: int, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> Below | None:
        """Owners through a batched matrix product: a second factor belongs to the responses with rows in the first."""
        items = owners if owners.ndim == 1 else self.of_items(owners)
        if owners.ndim > 2:
            return None
        mine = [owners] * (first + 1) + [items]
        return [None if s is None else of for s, of in zip(shapes, mine, strict=True)]

    def moved_from(self, owners: Owners | None, shape: Shape | None) -> Owners | None:
        """Owners of an input, from those of its gradient's elements, to which it may have been broadcast."""
        rows = None if owners is None else broadcast(owners, owners.shape, shape)
        if rows is None or rows.ndim == 0:
            return None
        only = rows.max(axis=-1, keepdims=True, initial=NOBODY)  # of a row's features some may be nobody's
        whole = rows.ndim > 1 and ((rows == only) | (rows == NOBODY)).all()
        return self.fewest(only[..., 0] if whole else rows)

    def taken_back(self, rows: Owners, places: Owners, shape: Shape) -> Owners | str:
        """Owners of the tensor that rows were indexed from; a row taken several times has to belong to one response."""
        whole = np.full(math.prod(shape), NOBODY)
        whole[places] = rows
        if not np.array_equal(whole[places], rows):
            return "a row that several responses take"
        return self.fewest(whole.reshape(shape))


def spread(owners: Owners, shape: Shape) -> Owners:
    """An owner array, broadcast to more dimensions."""
    return np.broadcast_to(owners.reshape(owners.shape + (1,) * (len(shape) - owners.ndim)), shape)


def broadcast(owners: Owners, out: Shape, shape: Shape | None) -> Owners | None:
    """Owners of an input of an elementwise operation; None where responses share it, as they share parameters."""
    if shape is None:
        return None
    added = len(out) - len(shape)
    if not added and shape[: owners.ndim] == owners.shape:
        return owners
    sizes = ((1,) * added + shape)[: owners.ndim]
    shared = tuple(k for k, size in enumerate(sizes) if size != owners.shape[k])
    only = cast(Owners, owners.max(axis=shared, keepdims=True, initial=NOBODY))
    agreed = added < owners.ndim and ((owners == only) | (owners == NOBODY)).all()
    return only.reshape(sizes[added:]) if agreed else None


def joined(one: Owners | str | None, other: Owners | str | None, node: Node) -> Owners | str | None:
    """Owners of a tensor that is used twice, from those that both uses give."""
    if one is other or isinstance(one, str):
        return one
    if isinstance(other, str):
        return other
    if one is None or other is None:
        return f"{kind_of(node)} broadcasts rows"
    if one.shape == other.shape:
        agree = (one == other) | (other == NOBODY)
        if agree.all():
            return one
        if (agree | (one == NOBODY)).all():
            return cast(Owners, np.where(one == NOBODY, other, one))
    wider, deeper = sorted((one, other), key=np.ndim)
    if deeper.shape[: wider.ndim] == wider.shape:  # told by fewer dimensions, and by more where some rows are nobody's
        same = spread(wider, deeper.shape) == deeper
        if (same | (deeper == NOBODY)).all():
            return wider
    return f"rows of several responses meet at {kind_of(node)}"


def _without(shape: Shape, dims: Sequence[int], lead: int) -> Iterator[int]:
    return (size for dim, size in enumerate(shape[:lead]) if dim not in dims)
