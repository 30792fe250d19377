"""Owners of an operation's inputs from those of its output, by what autograd's nodes are called and what they save.

An owner array has the leading dimensions of an activation, as few as tell: (n,) for (n, tokens, features), and
(n * tokens,) for flattened rows. `NOBODY` owns rows that no log-probability depends on. A graph does not show hooks on
activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import numpy as np

from pcr_torch.graph.nodes import (
    ELEMENTWISE,
    NORMALISING,
    RESHAPING,
    ROW_FUNCTIONS,
    Shape,
    dims_of,
    kind_of,
    shape_of,
    signed,
)
from pcr_torch.graph.owner_arrays import NOBODY, Below, OwnerArrays, Owners, broadcast, joined, spread
from pcr_torch.graph.owner_moves import MOVES, moved
from pcr_torch.graph.owner_specials import SPECIAL
from pcr_torch.probe import is_probe

Inputs: TypeAlias = "Sequence[tuple[Any, int]]"  # a node's next_functions

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
    """Rules that give the owners of an operation's inputs from those of its output."""

    def __init__(self, n: int) -> None:
        self._arrays = OwnerArrays(n)
        self.responses = self._arrays.responses
        self._found: dict[tuple[Any, ...], tuple[Owners, Below]] = {}  # with the owners, whose id is in the key

    def below(self, node: Any, inputs: Inputs, outputs: dict[int, Owners | str | None]) -> Below:
        """Owners of each of a node's inputs (its `next_functions`), from the owners of its outputs by number."""
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

    def _of_inputs(self, node: Any, kind: str, owners: Owners, out: Shape, shapes: list[Shape | None]) -> Below:
        unknown = f"{kind}, of which it is not known whether it keeps responses apart"
        if out[: owners.ndim] != owners.shape:
            return [unknown] * len(shapes)
        found = self._below(node, kind, owners, out, shapes)
        items = self._arrays.of_items(owners) if found is None else None
        if items is not None:  # attention mixes the tokens of an item, also those that are nobody's
            found = self._below(node, kind, items, out, shapes)
        if found is None and kind in MOVES:
            back = moved(node, owners, NOBODY)
            found = back and [self._arrays.moved_from(mine, s) for mine, s in zip(back, shapes, strict=True)]
        return [unknown] * len(shapes) if found is None else found

    def _together(self, node: Any, outputs: dict[int, Owners | str | None]) -> Owners | None:
        """Owners of a tensor that was split along its first dimension."""
        if signed(node._saved_dim) or any(not isinstance(owners, np.ndarray) for owners in outputs.values()):
            return None
        parts, unbound = [], kind_of(node) == "Unbind"
        depth = max(1, *(cast(Owners, owners).ndim + unbound for owners in outputs.values()))
        for k in range(len(node._input_metadata)):
            shape = ((1,) if unbound else ()) + shape_of(node, k)
            owners = cast(Owners, outputs.get(k, np.asarray(NOBODY)))
            owners = owners[None] if unbound and k in outputs else owners
            parts.append(spread(owners, shape[:depth]) if k in outputs else np.full(shape[:depth], NOBODY))
        return self._arrays.fewest(np.concatenate(parts))

    def _below(self, node: Any, kind: str, owners: Owners, out: Shape, shapes: list[Shape | None]) -> Below | None:
        lead, first = owners.ndim, next((s for s in shapes if s is not None), None)
        function = _function(node)
        if function in _BY_ELEMENT:
            return [broadcast(owners, out, s) for s in shapes]
        if function is not None:  # written in Python, under any name
            known = is_probe(node) or function in ROW_FUNCTIONS
            return self._arrays.matrix(owners, shapes, 0) if known else None
        if kind in _LINEAR:
            return self._arrays.matrix(owners, shapes, _LINEAR[kind])
        if kind in ELEMENTWISE or kind in _MORE_ELEMENTWISE:
            return [broadcast(owners, out, s) for s in shapes]
        if kind in NORMALISING:
            within = first is not None and len(node._saved_normalized_shape) <= len(first) - lead
            return [owners, *[None] * (len(shapes) - 1)] if within and first[:lead] == out[:lead] else None  # type: ignore[index]
        special = SPECIAL.get(kind)
        if special is not None:
            return special(self._arrays, node, owners, out, shapes)
        if first is None:
            return None
        if kind in _ALONG:
            return self._arrays.along(dims_of(node, len(first)), owners, out, shapes)
        if kind in _REDUCING:
            return self._arrays.reduced(dims_of(node, len(first)), owners, out, shapes)
        if kind in RESHAPING or kind in _COMPLEX:
            return [self._arrays.reshaped(owners, out, first)]
        if kind in _ATTENTION:
            batched = lead <= len(out) - 2 and all(s is None or s[:lead] == out[:lead] for s in shapes[:3])
            return [owners] * 3 + [f"{kind}'s bias"] * (len(shapes) - 3) if batched else None
        if kind in _BATCHED:
            return self._arrays.batched(_BATCHED[kind], owners, out, shapes)
        return None


def _function(node: Any) -> tuple[str, str] | None:
    """Module and name of a function that is written in Python."""
    function = getattr(node, "_forward_cls", None)
    return None if function is None else (function.__module__, function.__qualname__)
