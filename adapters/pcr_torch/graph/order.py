"""The nodes of a graph in the order in which a backward pass runs them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.autograd.graph import Node

from pcr_torch.graph.nodes import is_leaf

_MOVING = ("ToCopy", "Copy")  # operations that may take a tensor to another device


@dataclass(frozen=True)
class Use:
    """A node whose gradient number `k` is part of a leaf's."""

    node: Node
    k: int
    leaf: Tensor


class Step(NamedTuple):
    """A node in the order of a backward pass.

    Attributes:
        node: which.
        separates: nothing but what it leads to is left to do, and that is not a leaf.
        uses: of leaves.
    """

    node: Node
    separates: bool
    uses: list[Use]


def in_order(output: Tensor) -> Iterator[Step | None]:
    """The nodes in the order in which autograd runs them; None, and no more, where that is not known beforehand."""
    start = cast(Node, output.grad_fn)
    waiting, seen = [(-start._sequence_nr(), 0, start)], {start}
    while waiting:
        node = heapq.heappop(waiting)[2]
        # one device runs its nodes latest first; several run theirs side by side. Hooks on a module's gradients sit in
        # nodes of their own, which change what passes only when a pass goes on beyond them
        name = node.name()
        moves = hasattr(node, "_forward_cls") or name.startswith(_MOVING)
        if moves and any(into.device != output.device for into in _metadata_around(node)):
            yield None
            return
        if name == "BackwardHookFunctionBackward":
            yield None
            return
        number = node._sequence_nr()
        separates = not waiting
        uses: list[Use] = []
        for k, (after, _) in enumerate(node.next_functions):
            if after is None:
                continue
            if is_leaf(after):
                uses.append(Use(node, k, cast(Any, after).variable))
                separates = False
            elif after not in seen:
                later = after._sequence_nr()
                if later >= number:
                    yield None
                    return
                seen.add(after)
                heapq.heappush(waiting, (-later, len(seen), after))
        yield Step(node, separates and bool(waiting), uses)


def _metadata_around(node: Any) -> Iterator[Any]:
    """Metadata of the gradients that come to a node, and of those that it gives."""
    yield from node._input_metadata
    for after, k in node.next_functions:
        if after is not None and not is_leaf(after):
            yield after._input_metadata[k]
