"""Rows (tokens) of activations that exactly one log-probability depends on: there one backward pass gives both streams.

From the output of the last attention layer to the head, a transformer treats each token by itself. There, row t of an
activation's gradient is the cotangent of log-probability t times a factor. So after a backward pass of the sum of the
streams, with cotangent c = w_p + w_s, stream k's gradient of that row is the sum's times w_k / c.

How far that holds is read off the graph, operation by operation in autograd's order. The first operation that may mix
rows ends it. So does float16, in which a sum of cotangents that nearly cancel could underflow. Paths
that lead to parameters alone need no rows: parameters outside the blocks get the sum's gradient anyway. Hooks on
activations cannot be seen in a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pcr_torch.graph.nodes import (
    ELEMENTWISE,
    NORMALISING,
    RESHAPING,
    ROW_FUNCTIONS,
    Shape,
    dims_of,
    is_leaf,
    kind_of,
    shape_of,
    signed,
)
from pcr_torch.probe import is_probe

# fmt: off
_ALONG = {  # the dimensions that they save
    "Amax", "Cat", "Gather", "LogSoftmax", "Logsumexp", "Mean", "Slice", "Softmax", "Split", "Sum",
}
# fmt: on
_LINEAR = {"Addmm": 1, "Linear": 0, "Mm": 0}  # which of their inputs has rows

Below = Sequence[Tensor | None]


class Rows:
    """Follows the rows of log-probabilities down their graph.

    Rows are a tensor of integers over a gradient's leading dimensions: the flat index of the log-probability that
    depends on the row, or their number where none does.

    Args:
        output: (n, T) the log-probabilities.
    """

    def __init__(self, output: Tensor) -> None:
        self._none, self._device = output.numel(), output.device
        start = torch.arange(self._none, device=self._device).view(output.shape)
        # of what comes to a node; None on the way to parameters
        self._of: dict[Node, Tensor | None] = {cast(Node, output.grad_fn): start}
        self._views: dict[tuple[int, Sequence[int]], Tensor] = {}
        self.apart = True  # no operation was met so far that may mix rows

    def take(self, node: Node) -> Tensor | None:
        """Rows of the gradient that comes to a node; to be called in autograd's order. None where they may be mixed."""
        if not self.apart:
            return None
        rows = self._of.pop(node, None)
        below: Below | None = [None] * len(node.next_functions)
        if rows is not None:
            below = self._below(node, rows)
        elif hasattr(node, "_forward_cls"):  # layers inside, on the way to a weight that they make
            below = None
        if below is None:
            self.apart = False
            return None
        for (after, _), mine in zip(node.next_functions, below, strict=True):
            if after is not None and not is_leaf(after):
                self.apart &= self._of.setdefault(after, mine) is mine
        return rows

    def below(self, node: Node) -> tuple[Tensor, ...] | None:
        """Rows of the gradients that a taken node gives to its inputs; None where one has none, or is of float16."""
        edges = [(after, k) for after, k in node.next_functions if after is not None]
        found = [self._of.get(after) for after, _ in edges]
        narrow = any(cast(Any, after)._input_metadata[k].dtype == torch.float16 for after, k in edges)
        known = self.apart and not narrow and all(rows is not None for rows in found)
        return cast(tuple[Tensor, ...], tuple(found)) if known else None

    def _below(self, node: Any, rows: Tensor) -> Below | None:
        """Rows of the gradients that a node gives, by edge; None where it may mix rows."""
        if any(into.dtype == torch.float16 for into in node._input_metadata):
            return None
        shapes = [None if after is None else shape_of(after, k) for after, k in node.next_functions]
        first, lead, kind = shapes[0], rows.shape, kind_of(node)
        cls = getattr(node, "_forward_cls", None)
        if cls is not None:  # written in Python, under any name
            known = is_probe(node) or (cls.__module__, cls.__qualname__) in ROW_FUNCTIONS
            return _through_matrix(rows, shapes, 0) if known else None
        if kind in _LINEAR:
            return _through_matrix(rows, shapes, _LINEAR[kind])
        if kind in ELEMENTWISE or (kind == "Cat" and shapes == [shape_of(node, 0)]):
            # broadcasting gives to several rows what has fewer dimensions, or a 1 among these
            dims = len(shape_of(node, 0))
            return [rows if s is not None and len(s) == dims and _starts(s, lead) else None for s in shapes]
        if kind in NORMALISING:
            within = first is None or len(node._saved_normalized_shape) <= len(first) - len(lead)
            return [rows, *[None] * (len(shapes) - 1)] if within and _starts(first, lead) else None
        if kind == "MaskedScatter":
            return self._scattered(node, rows, shapes)
        if kind == "IndexPut" and not node._saved_accumulate:
            return self._put(node, rows, shapes)
        if first is None:
            return None
        if kind == "Slice" and node._saved_dim < len(lead):
            return [self._sliced(node, rows, first)]
        if kind in _ALONG:
            within = all(dim >= len(lead) for dim in dims_of(node, len(first)))
            return [rows] * len(shapes) if within and all(_starts(s, lead) for s in shapes) else None
        if kind in RESHAPING:
            return self._reshaped(rows, first)
        if kind == "Index" and len(node._saved_indices) == 1 and node._saved_indices[0] is not None:
            return self._indexed(node._saved_indices[0], rows, first)
        if kind == "IndexSelect" and node._saved_dim == 0:
            return self._indexed(node._saved_index, rows, first)
        return None

    def _reshaped(self, rows: Tensor, shape: Shape) -> Below | None:
        """Elements keep their order, and so do rows where some leading dimensions are as many."""
        if _starts(shape, rows.shape):
            return [rows]
        for k in range(1, len(shape) + 1):
            if math.prod(shape[:k]) == rows.numel():
                # ways that part and meet have to find one and the same tensor
                self._views.setdefault((rows.data_ptr(), rows.shape), rows)
                return [self._views.setdefault((rows.data_ptr(), shape[:k]), rows.view(shape[:k]))]
        return None

    def _sliced(self, node: Any, rows: Tensor, shape: Shape) -> Tensor:
        start, end = (signed(bound) for bound in (node._saved_start, node._saved_end))
        whole = self._nowhere(shape[: rows.ndim])
        whole[(slice(None),) * node._saved_dim + (slice(start, end, node._saved_step),)] = rows
        return whole

    def _indexed(self, chosen: Tensor, rows: Tensor, shape: Shape) -> Below | None:
        """Rows that a mask has chosen, or their numbers, in any order but none of them twice."""
        if chosen.dtype == torch.bool:
            if rows.ndim != 1:
                return None
            whole = self._nowhere(shape[: chosen.ndim])
        else:
            chosen = chosen % shape[0]  # from the end too
            if chosen.ndim != 1 or len(set(chosen.tolist())) < len(chosen):
                return None
            whole = self._nowhere((shape[0], *rows.shape[1:]))
        whole[chosen] = rows
        return [whole]

    def _scattered(self, node: Any, rows: Tensor, shapes: Sequence[Shape | None]) -> Below | None:
        """One number a row, where a mask has put them."""
        mask, (onto, source) = node._saved_mask, shapes
        if mask.shape != rows.shape or list(rows.shape) != list(shape_of(node, 0)) or source is None:
            return None
        whole, chosen = self._nowhere((math.prod(source),)), rows[mask]
        whole[: len(chosen)] = chosen
        return [rows if onto == tuple(rows.shape) else None, whole.view(source)]

    def _put(self, node: Any, rows: Tensor, shapes: Sequence[Shape | None]) -> Below | None:
        """Rows written over others, each to a place of its own."""
        places = node._saved_indices[0]
        if len(node._saved_indices) > 1 or places is None or places.dtype == torch.bool or places.ndim != 1:
            return None
        places = places % len(rows)
        source = (len(places), *rows.shape[1:])
        if len(set(places.tolist())) < len(places) or shapes[1] is None or shapes[1][: rows.ndim] != source:
            return None
        return [rows, rows[places]]

    def _nowhere(self, shape: Sequence[int]) -> Tensor:
        return torch.full(tuple(shape), self._none, device=self._device)


def row_shares(cotangents: Sequence[Tensor]) -> Tensor | None:
    """(streams, n * T + 1) each stream's share of the sum's rows, by what `Rows` calls them.

    None where cotangents cancel to 0, of which the sum says nothing, and of one stream.
    """
    if len(cotangents) == 1:
        return None
    parts = torch.stack([c.reshape(-1) for c in cotangents])
    total = sum(cotangents[1:], start=cotangents[0]).reshape(-1)
    if ((total == 0) & (parts != 0).any(dim=0)).any():
        return None
    wide = torch.promote_types(total.dtype, torch.float32)
    shares = torch.where(total == 0, 0.0, parts.to(wide) / total.to(wide))
    return torch.cat([shares, shares.new_zeros(len(parts), 1)], dim=1)


def share_of(gradient: Tensor, shares: Tensor) -> Tensor:
    """A stream's part of a gradient, for its shares of the leading dimensions."""
    return (gradient * shares.view(*shares.shape, *[1] * (gradient.ndim - shares.ndim))).to(gradient.dtype)


def _through_matrix(rows: Tensor, shapes: Sequence[Shape | None], k: int) -> Below | None:
    """Rows through a product of input number `k` with a matrix that all rows share; it mixes the last dimension."""
    shape = shapes[k]
    if shape is not None and (not _starts(shape, rows.shape) or len(shape) == rows.ndim):
        return None
    return [rows if j == k else None for j in range(len(shapes))]


def _starts(shape: Shape | None, lead: Sequence[int]) -> bool:
    return shape is None or shape[: len(lead)] == tuple(lead)
