"""Owners of an operation's inputs from those of its output, by what autograd's nodes are called and what they save.

An owner array has the leading dimensions of an activation, as few as tell: (n,) for (n, tokens, features), and
(n * tokens,) for flattened rows. `NOBODY` owns rows that no log-probability depends on. A graph does not show hooks on
activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import Node

from pcr_torch.owner_moves import MOVES, moved
from pcr_torch.probe import is_probe
from pcr_torch.rows import (
    ELEMENTWISE,
    NORMALISING,
    RESHAPING,
    ROW_FUNCTIONS,
    dims_of,
    kind_of,
    shape_of,
    signed,
)

NOBODY = -1
Owners: TypeAlias = NDArray[np.int64]
Shape = tuple[int, ...]
Inputs: TypeAlias = "Sequence[tuple[Any, int]]"  # a node's next_functions
_Below: TypeAlias = "Sequence[Owners | str | None]"  # by input: owners; why there are none; None: has no rows

# fmt: off
_MORE_ELEMENTWISE = {
    "Addcdiv", "Addcmul", "Atan2", "Ceil", "Celu", "Cos", "Cosh", "Floor", "Fmod", "Lerp", "LogSigmoid", "Remainder",
    "Round", "Selu", "Sgn", "Sign", "Sin", "Sinh", "Tan", "Threshold", "Xlogy",
}
_ALONG = {  # operations within the dimensions that they save, of the input
    "Cummax", "Cumprod", "Cumsum", "Gather", "Glu", "LogSoftmax", "Logcumsumexp", "SafeSoftmax", "Scatter", "Softmax",
    "Sort", "Split", "SplitWithSizes", "Topk", "Unbind",
}
_REDUCING = {
    "Amax", "Amin", "LinalgVectorNorm", "Logsumexp", "Max", "Mean", "Min", "Norm", "Prod", "Std", "Sum", "Var",
}
_ATTENTION = {
    "ScaledDotProductFlashAttentionForCpu", "ScaledDotProductFlashAttention", "ScaledDotProductEfficientAttention",
    "ScaledDotProductCudnnAttention", "ScaledDotProductFusedAttentionOverrideable",
}
# fmt: on
# functions written in Python: what goes through as it is, and what works element by element
_IDENTITIES = {("torch.distributed.fsdp._fully_shard._fsdp_param_group", "RegisterPostBackwardFunction")}
_BY_ELEMENT = {("transformers.models.bloom.modeling_bloom", "GeLUFunction")}
_COMPLEX = {"ViewAsComplex", "ViewAsReal"}
_APART = {"Split", "SplitWithSizes", "Unbind"}
_LINEAR = {"Addmm": 1, "Linear": 0, "Mm": 0, "Mv": 0, "GroupedMm": 0}  # which of their inputs has rows
_BATCHED = {"Bmm": 0, "Baddbmm": 1}  # which of their inputs is the first factor
# what a rule reads of a node besides shapes; layers repeat each other, so of these kinds it is applied once
_READ: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ELEMENTWISE | _MORE_ELEMENTWISE | RESHAPING | _COMPLEX | _ATTENTION, ()),
    **dict.fromkeys((*_LINEAR, *_BATCHED, "Expand", "T", "_Probe"), ()),
    **dict.fromkeys(("Cat", "LogSoftmax", "Mean", "Softmax", "Sum"), ("_saved_dim",)),
    "Permute": ("_saved_dims",),
    "Slice": ("_saved_dim", "_saved_start", "_saved_end", "_saved_step"),
    "Transpose": ("_saved_dim0", "_saved_dim1"),
}


class Follow:
    """Owners of an operation's inputs from those of its output."""

    def __init__(self, n: int) -> None:
        self.responses: Owners = np.arange(n)
        self._views: dict[tuple[int, Shape, Shape], tuple[Owners, Owners | str]] = {}
        self._found: dict[tuple[Any, ...], tuple[Owners, _Below]] = {}  # with the owners, whose id is in the key

    def below(self, node: Any, inputs: Inputs, outputs: dict[int, Owners | str | None]) -> _Below:
        """Of each of a node's inputs, which are its `next_functions`, by the owners of its outputs by their number."""
        kind, function = kind_of(node), getattr(node, "_forward_cls", None)
        if kind in _APART and len(inputs) == 1:
            whole = self._together(node, outputs)
            if whole is not None:
                return [whole]
        if function is not None and _function(node) in _IDENTITIES and len(inputs) == len(node._input_metadata):
            return [outputs.get(k) for k in range(len(inputs))]
        first = next(iter(outputs), 0)
        owners = outputs.get(first)
        if len(outputs) > 1:
            for k, others in outputs.items():
                owners = owners if k == first else joined(owners, others, node)
        if owners is None or isinstance(owners, str):
            return [owners] * len(inputs)
        out = shape_of(node, first)
        shapes = [None if after is None else shape_of(after, k) for after, k in inputs]
        read = _READ.get(kind)
        if read is None or (function is not None and kind != "_Probe"):
            return self._of_inputs(node, kind, owners, out, shapes)
        key = (kind, function, id(owners), out, *shapes, *[getattr(node, name, None) for name in read])
        if key not in self._found:
            self._found[key] = owners, self._of_inputs(node, kind, owners, out, shapes)
        return self._found[key][1]

    def _of_inputs(self, node: Any, kind: str, owners: Owners, out: Shape, shapes: list[Shape | None]) -> _Below:
        unknown = f"{kind}, of which it is not known whether it keeps responses apart"
        if out[: owners.ndim] != owners.shape:
            return [unknown] * len(shapes)
        found = self._below(node, kind, owners, out, shapes)
        items = self._of_items(owners) if found is None else None
        if items is not None:  # attention mixes the tokens of an item, also those that are nobody's
            found = self._below(node, kind, items, out, shapes)
        if found is None and kind in MOVES:
            back = moved(node, owners, NOBODY)
            found = back and [self._moved_from(mine, s) for mine, s in zip(back, shapes, strict=True)]
        return [unknown] * len(shapes) if found is None else found

    def _together(self, node: Any, outputs: dict[int, Owners | str | None]) -> Owners | None:
        """Of what is split along its first dimension."""
        if signed(node._saved_dim) or any(not isinstance(owners, np.ndarray) for owners in outputs.values()):
            return None
        parts, unbound = [], kind_of(node) == "Unbind"
        depth = max(1, *(cast(Owners, owners).ndim + unbound for owners in outputs.values()))
        for k in range(len(node._input_metadata)):
            shape = ((1,) if unbound else ()) + shape_of(node, k)
            owners = cast(Owners, outputs.get(k, np.asarray(NOBODY)))
            owners = owners[None] if unbound and k in outputs else owners
            parts.append(spread(owners, shape[:depth]) if k in outputs else np.full(shape[:depth], NOBODY))
        return self._fewest(np.concatenate(parts))

    def _below(self, node: Any, kind: str, owners: Owners, out: Shape, shapes: list[Shape | None]) -> _Below | None:
        lead, first = owners.ndim, next((s for s in shapes if s is not None), None)
        function = _function(node)
        if function in _BY_ELEMENT:
            return [_broadcast(owners, out, s) for s in shapes]
        if function is not None:  # written in Python, under any name
            known = is_probe(node) or function in ROW_FUNCTIONS
            return self._matrix(owners, shapes, 0) if known else None
        if kind in _LINEAR:
            return self._matrix(owners, shapes, _LINEAR[kind])
        if kind in ELEMENTWISE or kind in _MORE_ELEMENTWISE:
            return [_broadcast(owners, out, s) for s in shapes]
        if kind in NORMALISING:
            within = first is not None and len(node._saved_normalized_shape) <= len(first) - lead
            return [owners, *[None] * (len(shapes) - 1)] if within and first[:lead] == out[:lead] else None  # type: ignore[index]
        special = _SPECIAL.get(kind)
        if special is not None:
            return special(self, node, owners, out, shapes)
        if first is None:
            return None
        if kind in _ALONG:
            return self._along(dims_of(node, len(first)), owners, out, shapes)
        if kind in _REDUCING:
            return self._reduced(dims_of(node, len(first)), owners, out, shapes)
        if kind in RESHAPING or kind in _COMPLEX:
            return [self._reshaped(owners, out, first)]
        if kind in _ATTENTION:
            batched = lead <= len(out) - 2 and all(s is None or s[:lead] == out[:lead] for s in shapes[:3])
            return [owners] * 3 + [f"{kind}'s bias"] * (len(shapes) - 3) if batched else None
        if kind in _BATCHED:
            return self._batched(_BATCHED[kind], owners, out, shapes)
        return None

    def _along(self, dims: list[int], owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        """What works along dimensions may mix their rows where these are one response's, as in time-major order."""
        lead, mixed = owners.ndim, tuple(dim for dim in dims if dim < owners.ndim)
        if any(s is not None and [*_without(s, mixed, lead)] != [*_without(out, mixed, lead)] for s in shapes):
            return None
        if mixed:
            only = owners.max(axis=mixed, keepdims=True)  # NOBODY is below all
            if not ((owners == only) | (owners == NOBODY)).all():
                return None
            owners = only
        return [None if s is None else self._fewest(np.broadcast_to(owners, s[:lead])) for s in shapes]

    def _reduced(self, dims: list[int], owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        """Rows of whatever a sum was taken over belong to whom the sum belongs."""
        shape = shapes[0]
        if shape is None:
            return None
        for dim in sorted(dims) if len(out) < len(shape) else ():
            if dim <= owners.ndim:
                owners = np.expand_dims(owners, dim)
        return [self._fewest(np.broadcast_to(owners, shape[: owners.ndim]))]

    def _matrix(self, owners: Owners, shapes: Sequence[Shape | None], k: int) -> _Below | None:
        """Of a product of input number `k` with what is the same for all rows; it mixes the last dimension."""
        shape = shapes[k]
        if shape is not None and (shape[: owners.ndim] != owners.shape or len(shape) == owners.ndim):
            return None
        return [owners if j == k else None for j in range(len(shapes))]

    def _batched(self, first: int, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        """Products of matrices: the second factor's rows are everybody's who has a row of the first, like an expert."""
        items = owners if owners.ndim == 1 else self._of_items(owners)
        if owners.ndim > 2:
            return None
        mine = [owners] * (first + 1) + [items]
        return [None if s is None else of for s, of in zip(shapes, mine, strict=True)]

    def _moved_from(self, owners: Owners | None, shape: Shape | None) -> Owners | None:
        """Of an input, for those of its gradient's elements, to which it may have been broadcast."""
        rows = None if owners is None else _broadcast(owners, owners.shape, shape)
        if rows is None or rows.ndim == 0:
            return None
        only = rows.max(axis=-1, keepdims=True, initial=NOBODY)  # of a row's features some may be nobody's
        whole = rows.ndim > 1 and ((rows == only) | (rows == NOBODY)).all()
        return self._fewest(only[..., 0] if whole else rows)

    def _reshaped(self, owners: Owners, out: Shape, shape: Shape) -> Owners | str:
        """Elements keep their order, and so do rows where some leading dimensions are as many."""
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
                    return self._fewest(spread(owners, out[:m]).reshape(shape[:k]))
        return "a view in which rows are not contiguous"

    def _fewest(self, owners: Owners) -> Owners:
        """Without trailing dimensions along which owners are the same."""
        while owners.ndim > 1 and owners.shape[-1] and bool((owners == owners[..., :1]).all()):
            owners = owners[..., 0]
        return self.responses if np.array_equal(owners, self.responses) else owners

    def _of_items(self, owners: Owners) -> Owners | None:
        """By the first dimension alone, where nothing along the others is another response's."""
        if owners.ndim == 1:
            return None
        flat = owners.reshape(len(owners), -1)
        only = flat.max(axis=1)  # NOBODY is below all
        return self._fewest(only) if ((flat == only[:, None]) | (flat == NOBODY)).all() else None

    # -- operations whose rule depends on what they save --------------------------------------------------------------

    def transposed(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        dims = list(range(len(out)))
        one, other = signed(node._saved_dim0) % len(out), signed(node._saved_dim1) % len(out)
        dims[one], dims[other] = other, one
        return [self._permuted(owners, out, dims)]

    def permuted(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        return [self._permuted(owners, out, [signed(d) % len(out) for d in node._saved_dims])]

    def _permuted(self, owners: Owners, out: Shape, dims: list[int]) -> Owners:
        """Dimension j of the output is dimension dims[j] of the input."""
        mine = dims[: owners.ndim]
        if mine == list(range(owners.ndim)):
            return owners
        depth = max(mine) + 1
        there = [out[dims.index(d)] for d in range(depth)]
        placed = owners.transpose(np.argsort(mine)).reshape([there[d] if d in mine else 1 for d in range(depth)])
        return self._fewest(np.broadcast_to(placed, there))

    def turned(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        return [self._permuted(owners, out, list(reversed(range(len(out)))))]

    def loss(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        """Cross-entropy of (N, classes, ...), one number a row."""
        shape = shapes[0]
        if shape is None or len(shape) != len(out) + 1 or (shape[0], *shape[2:]) != out:
            return None
        wide = owners if owners.ndim == 1 else np.broadcast_to(owners[:, None], (*shape[:2], *owners.shape[1:]))
        return [self._fewest(wide)]

    def expanded(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        return [_broadcast(owners, out, shapes[0])]

    def repeated(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        shape, lead = shapes[0], owners.ndim
        return [owners] if shape is not None and len(shape) == len(out) and shape[:lead] == out[:lead] else None

    def padded(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        changed = [len(out) - 1 - k // 2 for k, count in enumerate(node._saved_pad) if signed(count)]
        return [owners] if all(dim >= owners.ndim for dim in changed) else None

    def convolved(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        batched = owners.ndim == 1 and (shapes[0] is None or shapes[0][0] == out[0])
        return [owners, None, None][: len(shapes)] if batched else None

    def concatenated(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        dim = signed(node._saved_dim) % len(out)
        if dim >= owners.ndim or shapes == [out]:
            return [owners] * len(shapes)
        missing = out[0] - sum(s[0] for s in shapes if s is not None)
        if dim or sum(s is None for s in shapes) > 1:
            return None
        ends = np.cumsum([missing if s is None else s[0] for s in shapes])[:-1]
        return [self._fewest(part) for part in np.split(owners, ends)]

    def picked(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        """One of several, such as x[0]: the others' rows are nobody's."""
        shape = shapes[0]
        if shape is None:
            return None
        dim = signed(node._saved_dim) % len(shape)
        if dim >= owners.ndim:
            return [owners] if shape[: owners.ndim] == out[: owners.ndim] else None
        whole = np.full(shape[: owners.ndim + 1], NOBODY)
        whole[(slice(None),) * dim + (signed(node._saved_index),)] = owners
        return [self._fewest(whole)]

    def stacked(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        dim = signed(node._saved_dim) % len(out)
        if dim >= owners.ndim:
            return [owners] * len(shapes)
        parts = np.moveaxis(owners, dim, 0)
        if owners.ndim == 1:  # each is one response's
            return [
                None if s is None or not s else np.full(s[:1], owner) for s, owner in zip(shapes, parts, strict=True)
            ]
        return [self._fewest(part) for part in parts]

    def triangular(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        return [owners] if owners.ndim <= len(out) - 2 else None

    def sliced(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        shape, dim = shapes[0], signed(node._saved_dim) % len(out)
        if shape is None or dim >= owners.ndim:
            return None if shape is None else [owners]
        whole = np.full(shape[: owners.ndim], NOBODY)
        at = slice(signed(node._saved_start), signed(node._saved_end), node._saved_step)
        whole[(slice(None),) * dim + (at,)] = owners
        return [self._fewest(whole)]

    def indexed(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
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
        return [self._taken_back(rows, places.flat, shape[: places.depth])]

    def selected(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        shape, dim = shapes[0], signed(node._saved_dim) % len(out)
        if shape is None or dim >= owners.ndim:
            return None if shape is None else [owners]
        if dim:
            return None
        rows = spread(owners, out[: owners.ndim])
        if rows.ndim > 1:
            return None
        return [self._taken_back(rows, node._saved_index.cpu().numpy() % shape[0], (shape[0],))]

    def put(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        places, source = _places(list(node._saved_indices), out), shapes[1]
        if places is None or owners.ndim > places.depth:
            return None
        if source is None:
            return [owners, None]
        if source[: len(places.shape)] != places.shape:
            return None
        rows = spread(owners, out[: places.depth]).reshape(-1)[places.flat]
        return [owners, self._fewest(rows.reshape(places.shape))]

    def added_at(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        if signed(node._saved_dim) % len(out) or owners.ndim > 1:
            return None
        return [owners, self._fewest(owners[node._saved_index.cpu().numpy() % len(owners)])]

    def mask_scattered(self, node: Any, owners: Owners, out: Shape, shapes: Sequence[Shape | None]) -> _Below | None:
        """Elements of a source, in their order, where a mask has put them, such as pictures' tokens into a prompt."""
        onto, source = shapes
        if source is None:
            return [_broadcast(owners, out, onto)]
        mask, of = np.broadcast_to(node._saved_mask.cpu().numpy(), out), out
        if source[-1] == out[-1] and (mask == mask[..., :1]).all():  # whole rows
            of, source, mask = out[:-1], source[:-1], mask[..., 0]
        if owners.ndim > len(of):
            return None
        chosen = spread(owners, of)[mask]
        whole = np.full(math.prod(source), NOBODY)
        whole[: len(chosen)] = chosen
        return [_broadcast(owners, out, onto), self._fewest(whole.reshape(source))]

    def _taken_back(self, rows: Owners, places: Owners, shape: Shape) -> Owners | str:
        """Rows back to where they were taken from; those taken several times have to go to one response."""
        whole = np.full(math.prod(shape), NOBODY)
        whole[places] = rows
        if not np.array_equal(whole[places], rows):
            return "a row that several responses take"
        return self._fewest(whole.reshape(shape))


@dataclass(frozen=True)
class _Places:
    """What indices take: places in the flattened first `depth` dimensions, and the shape in which they come."""

    shape: Shape
    flat: Owners
    depth: int


def _places(indices: Sequence[Tensor | None], shape: Shape) -> _Places | None:
    """Of leading dimensions; None for indices of another kind."""
    if any(index is None or index.dtype.is_floating_point for index in indices):
        return None
    arrays = [cast(Tensor, index).cpu().numpy() for index in indices]
    if any(a.dtype == bool for a in arrays):
        flat = np.flatnonzero(arrays[0])
        return _Places((len(flat),), flat, arrays[0].ndim) if len(arrays) == 1 else None
    arrays = list(np.broadcast_arrays(*(a % size for a, size in zip(arrays, shape))))
    flat = np.ravel_multi_index(tuple(arrays), shape[: len(arrays)]).reshape(-1)
    return _Places(arrays[0].shape, flat, len(arrays))


def joined(one: Owners | str | None, other: Owners | str | None, node: Node) -> Owners | str | None:
    """Of a tensor that is used twice: what has rows in neither way has none."""
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


def _function(node: Any) -> tuple[str, str] | None:
    """Module and name of a function that is written in Python."""
    function = getattr(node, "_forward_cls", None)
    return None if function is None else (function.__module__, function.__qualname__)


def _without(shape: Shape, dims: Sequence[int], lead: int) -> Iterator[int]:
    return (size for dim, size in enumerate(shape[:lead]) if dim not in dims)


def _broadcast(owners: Owners, out: Shape, shape: Shape | None) -> Owners | None:
    """Of an input of an elementwise operation; None where several responses share it, as they share parameters."""
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


def spread(owners: Owners, shape: Shape) -> Owners:
    """The same with more dimensions."""
    return np.broadcast_to(owners.reshape(owners.shape + (1,) * (len(shape) - owners.ndim)), shape)


_SPECIAL: dict[str, Callable[..., _Below | None]] = {
    "Cat": Follow.concatenated,
    "Select": Follow.picked,
    "Transpose": Follow.transposed,
    "Permute": Follow.permuted,
    "T": Follow.turned,
    "NllLoss": Follow.loss,
    "NllLoss2D": Follow.loss,
    "Expand": Follow.expanded,
    "Repeat": Follow.repeated,
    "ConstantPadNd": Follow.padded,
    "Convolution": Follow.convolved,
    "Stack": Follow.stacked,
    "Tril": Follow.triangular,
    "Triu": Follow.triangular,
    "Slice": Follow.sliced,
    "Index": Follow.indexed,
    "IndexSelect": Follow.selected,
    "IndexPut": Follow.put,
    "IndexAdd": Follow.added_at,
    "MaskedScatter": Follow.mask_scattered,
}
