"""The autograd graph of a forward pass, cut into segments; the backward passes of both streams alternate over them.

A segment's memory is freed once both streams have passed it, as in an ordinary backward pass. Below the lowest segment
with block parameters one backward pass of the streams' sum is enough.

A segment ends at a node that every path from the log-probabilities runs through: in a transformer, the additions to the
residual stream after attention and after the MLP. To find them, the nodes are visited in the order of a backward pass:
a node that is visited while no other waits is such a node. A graph without any (a skip connection around all layers) is
one segment.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pcr_torch.graph.order import Use, in_order
from pcr_torch.graph.rows import Rows
from pcr_torch.probe import is_probe


@dataclass(frozen=True)
class Segment:
    """Part of a graph.

    Attributes:
        roots: where it starts; None for the output itself.
        last: the node that it ends with; None where it goes down to the leaves.
        leaves: ids of the tensors whose gradient it has a part of.
        tensors: these, of those that `segments` was asked for.
        crossing: its uses of those that later segments use too.
        below: rows of the gradients at the next segment's roots, see `Rows`; none where they may be mixed.
    """

    roots: tuple[GradientEdge, ...] | None
    last: Node | None
    leaves: frozenset[int] = frozenset()
    tensors: tuple[Tensor, ...] = ()
    crossing: tuple[Use, ...] = ()
    below: tuple[Tensor, ...] = ()


_PARTS = 4  # of the graph below the first segment


def segments(output: Tensor, leaves: Set[int]) -> tuple[Segment, ...] | None:
    """Segments for the gradients of `leaves` (ids of tensors) alone.

    None where a backward pass of one stream cannot give the gradients of these alone: where modules have hooks on
    gradients, where there are several devices, and where several segments use a leaf, or a function that keeps its
    graph to itself may hide one.

    The first segment is the longest without any of the leaves in which rows of tokens are apart, with `below`. The
    others share the leaves about equally. They are few, since a backward pass of a segment visits all of the graph
    below it.
    """
    found: list[Segment] = []
    uses: list[list[Use]] = [[]]
    rows = Rows(output)
    start: tuple[GradientEdge, ...] | None = None
    top: tuple[Node, tuple[Tensor, ...], int] | None = None  # where a first segment could end
    reached, opaque = 0, False
    for step in in_order(output):
        if step is None:
            return None
        python = hasattr(step.node, "_forward_cls")
        opaque |= python and not is_probe(step.node)
        if not found:
            rows.take(step.node)
        mine = sum(id(use.leaf) in leaves for use in step.uses)
        if mine and top is not None and not found:
            node, at_roots, count = top
            found.append(Segment(None, node, below=at_roots))
            start, uses = _roots_below(node), [uses[0][:count], uses[0][count:]]
        uses[-1] += step.uses
        reached += mine
        # another stream is taken through its last node by hand
        if not step.separates or python or len(cast(Any, step.node)._input_metadata) > 1:
            continue
        if reached * _PARTS >= len(leaves):
            found.append(Segment(start, step.node))
            start, uses, reached = _roots_below(step.node), [*uses, []], 0
        elif not found and not reached and (below := rows.below(step.node)) is not None:
            top = step.node, below, len(uses[0])
    found.append(Segment(start, None))
    chain = _with_uses(found, uses, leaves)
    crossing = chain is None or any(id(use.leaf) in leaves for segment in chain for use in segment.crossing)
    hidden = chain is None or (opaque and not leaves <= frozenset().union(*(segment.leaves for segment in chain)))
    return None if crossing or hidden else chain


def _roots_below(node: Node) -> tuple[GradientEdge, ...]:
    return tuple(GradientEdge(after, k) for after, k in node.next_functions if after is not None)


def _with_uses(
    chain: Sequence[Segment], uses: Sequence[Sequence[Use]], wanted: Collection[int] = ()
) -> tuple[Segment, ...] | None:
    """With what each segment uses; None where a hook would see a part of a gradient only."""
    later: set[int] = set()
    found: list[Segment] = []
    for segment, mine in zip(reversed(chain), reversed(uses), strict=True):
        crossing = tuple(use for use in mine if id(use.leaf) in later)
        if any(use.leaf._backward_hooks for use in crossing):
            return None
        leaves = {id(use.leaf): use.leaf for use in mine}
        tensors = tuple(leaf for which, leaf in leaves.items() if which in wanted)
        later |= leaves.keys()
        found.append(replace(segment, leaves=frozenset(leaves), tensors=tensors, crossing=crossing))
    return tuple(reversed(found))


def back(segment: Segment, output: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
    """The last backward pass through a segment, which frees it; leaves get their .grad.

    Args:
        segment: of `segments(output)`.
        gradients: of output for the first segment, else what the pass through the segment before returned.

    Returns:
        The gradients at the next segment's roots; none below the last.
    """
    roots: Any = output if segment.roots is None else segment.roots
    if segment.last is None:
        torch.autograd.backward(roots, list(gradients))
        return []

    def arrive(found: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
        raise _Arrived(found)

    # autograd waits for all uses of a leaf, of which a segment sees its own
    hooks = [use.node.register_hook(_accumulate(use)) for use in segment.crossing]
    hooks.append(segment.last.register_hook(arrive))
    try:
        torch.autograd.backward(roots, list(gradients))
    except _Arrived as arrived:
        edges = segment.last.next_functions
        return [_or_zeros(g, edge) for g, edge in zip(arrived.found, edges, strict=True) if edge[0] is not None]
    finally:
        for hook in hooks:
            hook.remove()
    raise RuntimeError("a backward pass did not arrive at the end of its segment")


def back_for(
    segment: Segment, output: Tensor, gradients: Sequence[Tensor], *, onward: bool
) -> tuple[list[Tensor | None], list[Tensor]]:
    """The backward pass of another stream, before `back` of the segment: it adds to no .grad.

    Returns:
        The gradients of the segment's `tensors`, and, where the stream goes `onward`, those at the next one's roots.
    """
    last = segment.last if onward else None
    sought: Any = list(segment.tensors) if last is None else [*segment.tensors, GradientEdge(last, 0)]
    if not sought:
        return [], []
    roots: Any = output if segment.roots is None else segment.roots
    found = torch.autograd.grad(roots, sought, list(gradients), retain_graph=True, allow_unused=True)
    below = [] if last is None else _through_node(last, found[-1])
    return list(found[: len(segment.tensors)]), below


def _through_node(node: Node, gradient: Tensor | None) -> list[Tensor]:
    """Gradients of a node's inputs from that of its one output, as autograd has them but for hooks on inputs."""
    if gradient is None:
        handed: Sequence[Tensor | None] = [None] * len(node.next_functions)
    else:
        given = cast(Any, node)(gradient)
        handed = given if isinstance(given, tuple) else (given,)
    return [_or_zeros(g, edge) for g, edge in zip(handed, node.next_functions, strict=True) if edge[0] is not None]


class _Arrived(Exception):
    """Ends a backward pass: autograd runs nodes latest first, so all of the segment has run by then."""

    def __init__(self, found: Sequence[Tensor | None]) -> None:
        super().__init__("a segment's backward pass is over")
        self.found = found


def _accumulate(use: Use) -> Callable[[Sequence[Tensor | None], Sequence[Tensor | None]], None]:
    def add(found: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
        leaf, gradient = use.leaf, found[use.k]
        if gradient is not None:
            gradient = gradient.sum_to_size(leaf.shape).to(leaf.dtype)
            leaf.grad = gradient.clone() if leaf.grad is None else leaf.grad + gradient

    return add


def _or_zeros(gradient: Tensor | None, edge: tuple[Node | None, int]) -> Tensor:
    into = cast(Any, edge[0])._input_metadata[edge[1]]
    if gradient is None:
        return torch.zeros(into.shape, dtype=into.dtype, device=into.device)
    if gradient.shape != into.shape:
        gradient = gradient.sum_to_size(tuple(into.shape))
    return gradient if gradient.dtype == into.dtype else gradient.to(into.dtype)
