"""Which response each row of a layer's activations belongs to, read off the autograd graph of the log-probabilities.

A per-response norm is right only if the rows that are summed belong to one response. A shape that happens to fit
(pictures as many as responses, time before batch, as many experts as responses) proves nothing, so owners are carried
from the log-probabilities, of which row i is response i, down the graph, operation by operation: attention mixes tokens
of one response, not responses. Where an operation is not known, or rows of several responses meet, there are no owners
from there on; the reason is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import Node

from pcr_torch.graph.nodes import is_leaf, shape_of
from pcr_torch.graph.owner_arrays import NOBODY, Owners, joined, spread
from pcr_torch.graph.owner_rules import Follow, Inputs
from pcr_torch.probe import is_probe


@dataclass(frozen=True)
class Survey:
    """What the graph of a forward pass says of probed layers.

    Attributes:
        calls: of each probed layer by its path, the owners of its rows call by call, or why they are not known.
        bypassed: ids of leaves that something else than a probe uses.
    """

    calls: dict[str, list[Owners | str]] = field(default_factory=dict)
    bypassed: set[int] = field(default_factory=set)


def survey(output: Tensor) -> Survey:
    """Owners of the rows of every probed layer in the graph of `output` (n, T), the log-probabilities."""
    found = Survey()
    start = cast(Node, output.grad_fn)
    follow = Follow(output.shape[0])
    known: dict[Node, dict[int, Owners | str | None]] = {start: {output.output_nr: follow.responses}}  # by output
    order, leaves = _from_output(start)
    for node, inputs in order:
        mine = known.pop(node, {})
        probed = is_probe(node)
        if probed:
            # on the way to parameters only: a layer that makes weights
            why = mine.get(0)
            if why is None:
                why = "its output has no rows of responses"
            elif not isinstance(why, str) and why.ndim >= len(shape_of(node, 0)):
                why = "a row's features belong to several responses"
            found.calls.setdefault(cast(Any, node).path, []).append(why)
        for (after, k), owners in zip(inputs, follow.below(node, inputs, mine), strict=True):
            if after is None:
                continue
            if after in leaves:
                if not probed:
                    found.bypassed.add(id(cast(Any, after).variable))
            else:
                there = known.setdefault(after, {})
                there[k] = joined(there[k], owners, node) if k in there else owners
    return found


def arrangement(owners: Owners, n: int, lead: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """Where the rows of n responses are among activations (*lead, features); None where as many each, in order.

    Returns:
        (n, rows) places among the flattened rows, and (n, rows, 1) booleans, true where a response has fewer.
    """
    rows = spread(owners, lead).reshape(-1)
    if len(rows) % n == 0 and bool((rows.reshape(n, -1) == np.arange(n)[:, None]).all()):
        return None
    mine = [np.flatnonzero(rows == i) for i in range(n)]
    places = np.full((n, max(1, *map(len, mine))), NOBODY)
    for row, taken in zip(places, mine, strict=True):
        row[: len(taken)] = taken
    at = torch.from_numpy(places)
    return at.clamp(min=0), (at == NOBODY)[..., None]


def by_response(tensor: Tensor, n: int, where: tuple[Tensor, Tensor] | None) -> Tensor:
    """(..., features) activations on a CPU as (n, rows, features); a view where `arrangement` gave None."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    if where is None:
        return flat.view(n, -1, tensor.shape[-1])
    at, absent = where
    return flat[at].masked_fill(absent, 0)


def _from_output(start: Node) -> tuple[list[tuple[Node, Inputs]], set[Node]]:
    """Every node after all that use its output, with its inputs; and the leaves' nodes, which are not among them."""
    order: list[tuple[Node, Inputs]] = []
    seen, leaves = {start}, set[Node]()
    stack: list[tuple[Node, Inputs, Iterator[tuple[Any, int]]]] = []
    node = start
    inputs: Inputs = node.next_functions
    edges = iter(inputs)
    while True:
        for after, _ in edges:
            if after is None or after in seen or after in leaves:
                continue
            if is_leaf(after):
                leaves.add(after)
            else:
                seen.add(after)
                stack.append((node, inputs, edges))
                node, inputs = after, after.next_functions
                edges = iter(inputs)
                break
        else:
            order.append((node, inputs))
            if not stack:
                return order[::-1], leaves
            node, inputs, edges = stack.pop()
