"""The graph of a forward pass in segments, a layer each, so that both streams go back through it layer by layer.

Two backward passes over the whole graph would keep every activation alive through the first, and every output gradient
that the second needs as well. Layer by layer, each layer's memory is freed once both streams have left it, as in an
ordinary backward pass; and below the lowest layer with blocks the streams go on as one.

Cuts are identities in the graph, at the input of every layer with blocks and at the output of the last layer; nothing
outside the graph refers to it. Where they do not separate it (a skip connection around layers, several devices), each
backward pass is over the whole graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node


@dataclass(frozen=True)
class Segment:
    """Part of a graph.

    Attributes:
        root: where it starts; None for the output itself.
        cut: where it ends; None for the leaves.
        leaves: ids of the tensors whose gradient autograd accumulates in this segment.
        probed: ids of those whose gradient a probe can take.
    """

    root: GradientEdge | None
    cut: Node | None
    leaves: frozenset[int] = frozenset()
    probed: frozenset[int] = frozenset()


class Cuts:
    """Places cuts in a model's layers, and goes back from one to the next."""

    def __init__(self, layers: Sequence[nn.Module], last: nn.Module | None) -> None:
        """Cuts at the input of `layers` and at the output of `last`."""
        self._layers, self._last = layers, last
        self._hooks: list[Any] = []
        self._end: Node | None = None

    def install(self) -> None:
        self._hooks = [layer.register_forward_pre_hook(self._at_input, with_kwargs=True) for layer in self._layers]
        if self._last is not None:
            self._hooks.append(self._last.register_forward_hook(self._at_output))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def back(self, segment: Segment, output: Tensor, gradient: Tensor, *, keep: bool) -> Tensor | None:
        """One backward pass through a segment; leaves get their .grad. The gradient at its cut, if it ends in one."""
        root: Any = output if segment.root is None else segment.root
        self._end = segment.cut
        try:
            torch.autograd.backward(root, gradient, retain_graph=keep)
        except _Arrived as arrived:
            return arrived.gradient
        finally:
            self._end = None
        if segment.cut is not None:
            raise RuntimeError("a backward pass did not arrive at the input of its layer")
        return None

    def arrive(self, cut: Node, gradient: Tensor) -> None:
        if cut is self._end:
            raise _Arrived(gradient)

    def _at_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._cut(args[0]), *args[1:]), kwargs
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": self._cut(kwargs["hidden_states"])}
        return None

    def _at_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (self._cut(output[0]), *output[1:]) if isinstance(output, tuple) else self._cut(output)

    def _cut(self, x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()):
            return x
        return _Cut.apply(x, self)  # type: ignore[no-untyped-call]


class _Arrived(Exception):
    """Ends a backward pass at a cut. Autograd runs nodes latest first, so all above the cut have run by then."""

    def __init__(self, gradient: Tensor) -> None:
        super().__init__("a segment's backward pass is over")
        self.gradient = gradient


class _Cut(torch.autograd.Function):
    """Identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cuts: Cuts) -> Tensor:
        ctx.cuts = cuts
        return x.detach()  # not a view: layers may go on in place

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        ctx.cuts.arrive(ctx, grad_outputs[0])
        return grad_outputs[0], None


def segments(output: Tensor, cuts: Cuts) -> tuple[Segment, ...]:
    """The segments of output's graph from the top; a single one, to the leaves, where cuts do not separate it."""
    found: list[Segment] = []
    awaited: set[int] = set()
    root: GradientEdge | None = None
    while True:
        reached = _reach(cast(Node, output.grad_fn) if root is None else root.node, cuts)
        # autograd accumulates a leaf's gradient once all its uses have been seen, and a segment sees only its own
        shared = awaited & (reached.leaves | reached.probed)
        early = any(not _all_later(reached.nodes, end) for end in reached.cuts)
        if len(reached.cuts) > 1 or shared or early:
            return (Segment(None, None),)
        cut = next(iter(reached.cuts), None)
        found.append(Segment(root, cut, frozenset(reached.leaves), frozenset(reached.probed)))
        if cut is None:
            return tuple(found)
        awaited |= reached.leaves
        under, output_nr = cut.next_functions[0]
        root = GradientEdge(cast(Node, under), output_nr)


@dataclass(frozen=True)
class _Reached:
    nodes: set[Node]
    leaves: set[int]
    probed: set[int]
    cuts: set[Node]


def _reach(start: Node, cuts: Cuts) -> _Reached:
    """What is reached without passing a cut."""
    reached = _Reached(set(), set(), set(), set())
    queue = [(start, False)]
    while queue:
        node, from_probe = queue.pop()
        made_by = getattr(node, "_forward_cls", None)
        if hasattr(node, "variable"):
            (reached.probed if from_probe else reached.leaves).add(id(node.variable))
        elif made_by is _Cut and cast(Any, node).cuts is cuts:
            reached.cuts.add(node)
        elif node not in reached.nodes:
            reached.nodes.add(node)
            is_probe = getattr(made_by, "is_probe", False)  # its first input is the layer's
            queue.extend(
                (after, is_probe and k > 0) for k, (after, _) in enumerate(node.next_functions) if after is not None
            )
    return reached


def _all_later(nodes: set[Node], cut: Node) -> bool:
    """Whether autograd runs all of the nodes before the cut: they come later in the forward pass, on one device."""
    device = cast(Any, cut)._input_metadata[0].device
    return all(
        node._sequence_nr() > cut._sequence_nr() and all(m.device == device for m in cast(Any, node)._input_metadata)
        for node in nodes
    )


def layers_of(model: nn.Module, names: Sequence[str]) -> tuple[list[nn.Module], nn.Module | None]:
    """The layers from the lowest that holds one of the named parameters on, and the last; none without a ModuleList."""
    for start, stack in _stacks(model):
        indices = [int(name[len(start) :].partition(".")[0]) for name in names if name.startswith(start)]
        if indices:
            return list(stack)[min(indices) :], stack[len(stack) - 1]
    return [], None


def lies_on_top(model: nn.Module, path: str) -> bool:
    """Whether a module lies in the last layer of a stack or outside of it; true without a ModuleList."""
    for start, stack in _stacks(model):
        if path.startswith(start):
            return int(path[len(start) :].partition(".")[0]) == len(stack) - 1
    return True


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Every ModuleList, the outer ones first, with what the names of its elements begin with."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            yield f"{path}." if path else "", module
