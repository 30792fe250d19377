"""Functions of autograd that overwrite what a second backward pass needs, found in the first.

Some fused kernels write their gradients over the tensors they saved, to spare memory. Autograd counts the writes of its
own operations only and does not notice; the second pass through such a function would be wrong in silence. So in the
first microbatch every function written in Python is looked at before and after each pass that keeps its graph.

What checkpointing recomputes or a hook unpacks is new in each pass, and may be overwritten.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from pcr_torch.distributed import local
from pcr_torch.probe import is_probe

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def watch_saved(output: Tensor) -> None:
    """From now on a backward pass that keeps the graph of `output` raises where a function overwrites what it saved.

    The pass ends in a ValueError that names the function.
    """
    for node in _python_nodes(cast(Node, output.grad_fn)):
        watch = _Watch(node)
        node.register_prehook(watch.before)
        node.register_hook(watch.after)


class _Watch:
    """Of one function, which holds it: it must not keep the graph alive."""

    def __init__(self, node: Any) -> None:
        self._node = weakref.ref(node)
        self._name = f"{node._forward_cls.__module__}.{node._forward_cls.__qualname__}"
        self._sums: list[Tensor] = []

    def before(self, _: Sequence[Tensor | None]) -> None:
        self._sums = self._fingerprints() if _graph_is_kept() else []

    def after(self, _: Sequence[Tensor | None], __: Sequence[Tensor | None]) -> None:
        if not self._sums:
            return
        now, before, self._sums = self._fingerprints(), self._sums, []
        if not torch.equal(torch.stack(now), torch.stack(before)):
            raise ValueError(
                f"model: the backward pass of {self._name} overwrites the tensors that it saved, which autograd does "
                f"not notice, so the second of the two passes that PCR takes would be wrong. {_way_out(self._name)}"
            )

    def _fingerprints(self) -> list[Tensor]:
        node: Any = self._node()
        hooked = any(raw.unpack_hook is not None for raw in node._raw_saved_tensors)
        saved: list[Any] = [] if hooked else list(node.saved_tensors)
        for value in vars(node).values():
            saved += value if isinstance(value, (list, tuple)) else [value]
        return [_sum_of_bits(t) for t in saved if isinstance(t, Tensor)]


def _way_out(name: str) -> str:
    if name.endswith(".CompiledFunction"):
        return (
            "Set torch._functorch.config.donated_buffer=False and torch._inductor.config.fx_graph_cache=False before "
            "the model is compiled (the cache on disk does not tell graphs of the one kind from the other)"
        )
    return (
        "Use the model's own layers in place of this kernel, or checkpoint the layers that use it (what is recomputed "
        "is new in each pass)"
    )


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Of its bits, so that NaN is equal to itself; on the CPU."""
    plain = local(tensor.detach())
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    if type(plain) not in (Tensor, nn.Parameter) or plain.layout != torch.strided or not plain.numel():
        return torch.zeros((), dtype=torch.int64)
    return plain.contiguous().view(_BITS[plain.element_size()]).sum(dtype=torch.int64).cpu()


def _graph_is_kept() -> bool:
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _python_nodes(root: Node) -> Iterator[Any]:
    waiting, seen = [root], {root}
    while waiting:
        node = waiting.pop()
        if hasattr(node, "_forward_cls") and hasattr(node, "_raw_saved_tensors") and not is_probe(node):
            yield node
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
