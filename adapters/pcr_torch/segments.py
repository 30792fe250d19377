"""The graph of a forward pass in segments, so that both streams go back through it a part at a time.

Two backward passes over the whole graph would keep every activation alive through the first, and every output gradient
that the second needs as well. Segment by segment, memory is freed once both streams have left it, as in an ordinary
backward pass (but for what its last node saved: a sum saves nothing); and below the lowest segment with blocks the
streams go on as one.

A segment ends at a node that all of the graph above runs through: in a transformer the sums of the residual stream,
before and after attention. They are found by going over the graph in autograd's order: when a node is taken while no
other waits, all that is above it has been. Where there are none (a skip connection around layers, several devices),
each backward pass is over the whole graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pcr_torch.probe import is_probe
from pcr_torch.rows import Rows, is_leaf


@dataclass(frozen=True)
class Use:
    """A node whose gradient number `k` is part of a leaf's."""

    node: Node
    k: int

    @property
    def leaf(self) -> Tensor:
        return cast(Tensor, cast(Any, self.node.next_functions[self.k][0]).variable)


@dataclass(frozen=True)
class Segment:
    """Part of a graph.

    Attributes:
        roots: where it starts; None for the output itself.
        last: the node that it ends with; None where it goes down to the leaves.
        leaves: ids of the tensors whose gradient it has a part of.
        crossing: its uses of those that later segments use too.
        rows: of the gradients that come to probed layers, by their names, see `Rows`; None where rows may be mixed.
        below: rows of the gradients at the next segment's roots.
    """

    roots: tuple[GradientEdge, ...] | None
    last: Node | None
    leaves: frozenset[int] = frozenset()
    crossing: tuple[Use, ...] = ()
    rows: Mapping[str, Tensor] | None = None
    below: tuple[Tensor, ...] = ()


def whole() -> tuple[Segment, ...]:
    """The whole graph as one segment, of which nothing is known."""
    return (Segment(None, None),)


def segments(output: Tensor) -> tuple[Segment, ...]:
    """The segments of output's graph from the top; a single one, to the leaves, where it cannot be divided."""
    found: list[Segment] = []
    uses: list[list[Use]] = [[]]
    rows = Rows(output)
    arriving: dict[str, Tensor] = {}
    roots: tuple[GradientEdge, ...] | None = None
    worth_it = False
    for step in _in_order(output):
        if step is None:
            return whole()
        mine = rows.take(step.node)
        if mine is not None and is_probe(step.node):
            arriving[cast(Any, step.node).path] = mine
        uses[-1] += step.uses
        # what takes memory, and may take both streams, is in functions written in Python: probes, checkpointed layers
        worth_it |= hasattr(step.node, "_forward_cls")
        if step.separates and worth_it:
            below = rows.below(step.node)
            found.append(Segment(roots, step.node, rows=None if below is None else arriving, below=below or ()))
            roots = tuple(GradientEdge(after, k) for after, k in step.node.next_functions if after is not None)
            uses, arriving, worth_it = [*uses, []], {}, False
    found.append(Segment(roots, None, rows=arriving if rows.apart else None))
    return _with_uses(found, uses)


def _with_uses(chain: Sequence[Segment], uses: Sequence[Sequence[Use]]) -> tuple[Segment, ...]:
    later: set[int] = set()
    found: list[Segment] = []
    for segment, mine in zip(reversed(chain), reversed(uses), strict=True):
        crossing = tuple(use for use in mine if id(use.leaf) in later)
        if any(use.leaf._backward_hooks for use in crossing):
            return whole()  # a hook is run on all of a gradient
        leaves = frozenset(id(use.leaf) for use in mine)
        later |= leaves
        found.append(replace(segment, leaves=leaves, crossing=crossing))
    return tuple(reversed(found))


def back(segment: Segment, output: Tensor, gradients: Sequence[Tensor], *, keep: bool) -> list[Tensor]:
    """One backward pass through a segment; leaves get their .grad.

    Args:
        segment: of `segments(output)`.
        gradients: of output for the first segment, else what the pass through the segment before returned.
        keep: whether another pass through it follows.

    Returns:
        The gradients at the next segment's roots; none below the last.
    """
    roots: Any = output if segment.roots is None else segment.roots
    if segment.last is None:
        torch.autograd.backward(roots, list(gradients), retain_graph=keep)
        return []

    def arrive(found: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
        raise _Arrived(found)

    # autograd waits for all uses of a leaf, of which a segment sees its own
    hooks = [use.node.register_hook(_accumulate(use)) for use in segment.crossing]
    hooks.append(segment.last.register_hook(arrive))
    try:
        torch.autograd.backward(roots, list(gradients), retain_graph=keep)
    except _Arrived as arrived:
        edges = segment.last.next_functions
        return [_or_zeros(g, edge) for g, edge in zip(arrived.found, edges, strict=True) if edge[0] is not None]
    finally:
        for hook in hooks:
            hook.remove()
    raise RuntimeError("a backward pass did not arrive at the end of its segment")


def ends(segment: Segment, output: Tensor, leaves: Collection[int]) -> frozenset[Node]:
    """Calls of probed layers from whose input the segment leads to none of `leaves` (ids of tensors)."""
    starts = [output.grad_fn] if segment.roots is None else [edge.node for edge in segment.roots]
    leads: dict[Node, bool] = {}
    found: set[Node] = set()
    waiting = [(cast(Node, node), False) for node in starts]
    while waiting:
        node, known = waiting.pop()
        if is_leaf(node):
            leads[node] = id(cast(Any, node).variable) in leaves
            continue
        after = [] if node is segment.last else [each for each, _ in node.next_functions if each is not None]
        if not known:
            if node not in leads:
                leads[node] = False
                waiting += [(node, True), *((each, False) for each in after if each not in leads)]
            continue
        leads[node] = any(leads[each] for each in after)
        if is_probe(node):
            below = node.next_functions[0][0]
            if below is not None and not leads.get(below, False):  # what is below the segment was not visited
                found.add(node)
    return frozenset(found)


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
    if gradient is not None:
        return gradient
    into = cast(Any, edge[0])._input_metadata[edge[1]]
    return torch.zeros(into.shape, dtype=into.dtype, device=into.device)


@dataclass(frozen=True)
class _Step:
    """A node in the order of a backward pass.

    Attributes:
        node: which.
        separates: nothing but what it leads to is left to do, and that is not a leaf.
        uses: of leaves.
    """

    node: Node
    separates: bool
    uses: tuple[Use, ...]


def _in_order(output: Tensor) -> Iterator[_Step | None]:
    """The nodes in the order in which autograd runs them; None, and no more, where that is not known beforehand."""
    start = cast(Node, output.grad_fn)
    waiting, seen = [(-start._sequence_nr(), 0, start)], {start}
    while waiting:
        node = heapq.heappop(waiting)[2]
        # one device runs its nodes latest first; several run theirs side by side. Hooks on a module's gradients sit in
        # nodes of their own, which change what passes only when a pass goes on beyond them
        elsewhere = any(into.device != output.device for into in cast(Any, node)._input_metadata)
        if elsewhere or node.name() == "BackwardHookFunctionBackward":
            yield None
            return
        separates = not waiting
        uses: list[Use] = []
        for k, (after, _) in enumerate(node.next_functions):
            if after is None:
                continue
            if is_leaf(after):
                uses.append(Use(node, k))
                separates = False
            elif after._sequence_nr() >= node._sequence_nr():
                yield None
                return
            elif after not in seen:
                seen.add(after)
                heapq.heappush(waiting, (-after._sequence_nr(), len(seen), after))
        yield _Step(node, separates and bool(waiting), tuple(uses))
