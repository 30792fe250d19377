"""The graph of a loss: what it reaches, and whether each of its terms is one of the reward or of the KL term."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, cast

from torch import Tensor
from torch.autograd.graph import Node

from pcr_torch.graph.nodes import is_leaf

_PRODUCTS = ("MulBackward0", "DivBackward0", "MmBackward0", "BmmBackward0", "MvBackward0", "DotBackward0")


def leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that a backward pass of `loss` would add gradients to."""
    if loss.grad_fn is None:
        return [loss] if loss.requires_grad else []
    return [cast(Any, node).variable for node in _order(loss.grad_fn) if is_leaf(node)]


def is_reentrant(root: Tensor) -> bool:
    """Whether a reentrant checkpoint hides a part of its graph."""
    return root.grad_fn is not None and any(
        node.name() == "CheckpointFunctionBackward" for node in _order(root.grad_fn)
    )


def all_tagged(loss: Tensor, carrier: Tensor, tags: Collection[Tensor]) -> bool:
    """Whether every term of `loss` that depends on `carrier` depends on a tag as well.

    A term is what a sum is made of; in a product, the terms are those of the one factor that depends on a tag. Whatever
    joins several tensors and is no product (a choice, a minimum, a stack) counts as a sum of them.

    Example:
        >>> import torch
        >>> logp, advantages = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        >>> all_tagged((logp.exp() * advantages).sum(), logp, [advantages])
        True
        >>> all_tagged((logp.exp() * advantages + logp).sum(), logp, [advantages])
        False
    """
    assert loss.grad_fn is not None
    marks = {id(carrier): "carrier", **{id(tag): "tag" for tag in tags}}
    reached: dict[Node, set[str]] = {}
    for node in _order(loss.grad_fn):
        own = (
            {marks[id(cast(Any, node).variable)]} if is_leaf(node) and id(cast(Any, node).variable) in marks else set()
        )
        reached[node] = own.union(*(reached[child] for child in _children(node)))
    waiting, seen = [loss.grad_fn], set[Node]()
    while waiting:
        node = waiting.pop()
        if node in seen or not reached[node]:
            continue
        seen.add(node)
        children = [child for child in _children(node) if reached[child]]
        if node.name() in _PRODUCTS:
            tagged = [child for child in children if "tag" in reached[child]]
            if not tagged:
                return False
            waiting += tagged if len(tagged) == 1 else []
        elif children:
            waiting += children
        elif "tag" not in reached[node]:
            return False
    return True


def _children(node: Node) -> Iterator[Node]:
    return (child for child, _ in node.next_functions if child is not None)


def _order(root: Node) -> Iterator[Node]:
    """Every node once, after those that it leads to."""
    waiting, begun, done = [root], set[Node](), set[Node]()
    while waiting:
        node = waiting[-1]
        if node in begun:
            waiting.pop()
            if node not in done:
                done.add(node)
                yield node
            continue
        begun.add(node)
        waiting += [child for child in _children(node) if child not in begun]
