"""The fast pullback: both streams' gradients and their per-response inner products from two backward passes.

Where the gradient of a probed layer's output arrives (`probe.py`), the weight's gradient and its per-response inner
products are formed in one place (`products.py`). Two passes, a layer at a time (`segments.py`), give both streams; the
first only keeps the output gradients, so that each weight's gradient is formed once, in the second pass, and inner
products between the streams can be taken. Above the last attention the second stream needs no products of its own to
come down (`rows.py`); and where no block lies below a layer's input, the gradient there is that of the sum alone.

Linear layers outside the blocks are probed as well, to form the gradient of the summed stream once in place of twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pcr_torch.distributed import kept_whole, local, reduce_scatter
from pcr_torch.probe import install, layout, remove
from pcr_torch.products import WORKSPACE, Products, bias_products, in_range, matrix_gradient, weight_products
from pcr_torch.pullback import PAIRS, Pulled, total_dtype, wide_dtype
from pcr_torch.rows import Multiples
from pcr_torch.segments import Segment, back, ends, lies_on_top, segments, whole


@dataclass(frozen=True)
class _Kept:
    """Of a layer after the first pass: gradients of its output, and of its input where that may serve again."""

    dy: Tensor
    dx: Tensor | None


class Recorder:
    """Installs probes on the model's linear layers, and collects what they measure on block parameters."""

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter], workspace: int = WORKSPACE) -> None:
        self._model = model
        self._parameters = parameters
        self._workspace = workspace
        self._index = {name: k for k, name in enumerate(parameters)}
        self._pass: Literal["off", "keep", "measure"] = "off"
        self._strata: Sequence[Sequence[int]] = ()
        self._kept: dict[str, _Kept] = {}
        self._seen: set[tuple[str, str]] = set()
        self._tied: set[int] = set()  # weights that layers of several segments share
        self._lowest: Collection[str] = ()  # layers whose input's gradient is wanted of the streams' sum alone
        # FSDP schedules its gathering by whole backward passes
        self._sharded = any(isinstance(p, DTensor) for p in parameters.values())
        self._modules: dict[str, nn.Module] = {}
        # by attribute and not by identity: sharding libraries swap the parameters of a module around its forward
        self._members: dict[str, dict[str, str]] = {}
        self._top: set[str] = set()
        names = {id(p): name for name, p in parameters.items()}
        uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        for path, module in model.named_modules():
            mine = {at: names[id(p)] for at, p in module.named_parameters(recurse=False) if id(p) in names}
            on_top = lies_on_top(model, path)
            if layout(module) is not None and (mine or on_top or cast(Tensor, module.weight).requires_grad):
                self._modules[path] = module
                self._members[path] = mine
                if on_top:
                    self._top.add(path)
        # a tied weight's gradient has parts from several layers, and its norms need their sum
        found = {name for mine in self._members.values() for name in mine.values()}
        self.uncovered = tuple(n for n, p in parameters.items() if n not in found or uses[id(p)] > 1)

    def install(self) -> None:
        for path, module in self._modules.items():
            install(module, self, path)

    def remove(self) -> None:
        for module in self._modules.values():
            remove(module)

    def pull(self, logp: Tensor, cotangents: Sequence[Tensor], strata: Sequence[Sequence[int]]) -> Pulled:
        """Backward passes over logp's graph (freed at the end); other parameters' gradients go to their .grad."""
        pairs = PAIRS[len(cotangents)]
        dtype = wide_dtype(logp.device)
        shape = (len(pairs), logp.shape[0], len(self._index))
        self._pulled = Pulled(
            tuple({} for _ in cotangents),
            torch.zeros(shape, dtype=dtype, device=logp.device),
            torch.zeros((len(pairs), len(strata), len(self._index)), dtype=dtype, device=logp.device),
        )
        self._strata = strata
        before = {name: _version(p.grad) for name, p in self._parameters.items()}
        try:
            self._through(logp, cotangents)
            if self._kept:
                raise RuntimeError(f"the two backward passes saw different layers: {sorted(self._kept)}")
            self._refuse_bypass(before)
            return self._pulled
        finally:
            self._pass = "off"
            self._kept.clear()
            self._seen.clear()
            self._tied.clear()
            self._lowest = ()
            del self._pulled

    def _through(self, logp: Tensor, cotangents: Sequence[Tensor]) -> None:
        """The streams' backward passes, segment by segment; as one below the last segment with blocks."""
        chain = whole() if self._sharded else segments(logp)
        held = [segment.leaves | segment.probed for segment in chain]
        ours = {id(parameter) for parameter in self._parameters.values()}
        # blocks that are not seen may hide in a node that keeps its graph to itself, as reentrant checkpointing does
        hidden = not ours <= frozenset().union(*held)
        for k, segment in enumerate(chain):
            self._tied |= segment.probed & frozenset().union(*held[k + 1 :])
        if not hidden and len(cotangents) > 1:
            lowest = max(k for k, each in enumerate(held) if ours & each)
            self._lowest = ends(chain[lowest], logp, ours)
        streams = [[cotangent] for cotangent in cotangents]
        for k, segment in enumerate(chain):
            below = not hidden and not any(ours & each for each in held[k:])
            if below:
                segment = Segment(segment.roots, None)
                streams = [[sum(each[1:], start=each[0]) for each in zip(*streams, strict=True)]]
            for stream, gradients in enumerate(streams):
                last = stream == len(streams) - 1
                self._pass = "measure" if last else "keep"
                with nullcontext() if last else kept_whole(self._model):
                    streams[stream] = back(segment, logp, gradients, keep=not last)
            if below:
                return

    def _refuse_bypass(self, before: dict[str, tuple[int, int] | None]) -> None:
        for name, parameter in self._parameters.items():
            if _version(parameter.grad) != before[name]:
                raise ValueError(
                    f"{name} got a gradient that the fast path did not see: logp was computed before PCR(model) was "
                    "made, or the weight is used outside its layer (tied, or read by a fused kernel). Make PCR(model) "
                    "first; else use norms='loop' or leave the weight out of the blocks"
                )

    def arrived(
        self, path: str, x: Tensor | None, weight: Tensor, dy: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `probe.Receiver`. Of block parameters autograd gets nothing.

        A layer outside the blocks that is called several times is kept in its first call only (both passes come to the
        calls in one order), the others are differentiated in either pass as autograd would.
        """
        transposed = layout(self._modules[path]) == "in_out"
        members: Mapping[str, str] = {} if self._pass == "off" else self._members[path]
        again = self._seen_again(path)
        if members:
            self._refuse_unmeasurable(path, x, again)

        def back(dy: Tensor) -> Tensor:
            matrix = weight.to(dy.dtype)
            return dy @ (matrix.T if transposed else matrix)

        if self._pass == "keep" and not again:
            dx = back(dy) if wanted[0] and path not in self._lowest else None
            self._kept[path] = _Kept(dy, dx if path in self._top else None)
            return dx, None, None
        kept = None if again else self._kept.pop(path, None)
        dys = (dy,) if kept is None else (kept.dy, dy)
        shared = None
        if kept is not None and kept.dx is not None:
            shared = Multiples.of(*dys)
            dx = shared.input_gradient(back, kept.dx)
        elif wanted[0]:
            dx = back(kept.dy + dy if kept is not None and path in self._lowest else dy)
        else:
            dx = None
        if members:
            assert x is not None
            with torch.no_grad():
                self._measure(members, x, dys, transposed)
        left = [name for name, want in zip(("weight", "bias"), wanted[1:], strict=True) if want and name not in members]
        return dx, *self._outside(path, x, dys, shared, left, transposed)

    def _seen_again(self, path: str) -> bool:
        if self._pass == "off":
            return False
        again = (self._pass, path) in self._seen
        self._seen.add((self._pass, path))
        return again

    def _refuse_unmeasurable(self, path: str, x: Tensor | None, again: bool) -> None:
        if again:
            raise ValueError(f"{path} is used twice in one forward pass; use PCR(..., norms='loop')")
        n = self._pulled.response.shape[1]
        if x is None or x.ndim != 3 or x.shape[0] != n:
            raise ValueError(
                f"{path} got input of shape {tuple(x.shape) if x is not None else ()}; the fast path expects ({n}, "
                "tokens, features), a row a response. Packed batches and routed experts need PCR(..., norms='loop')"
            )

    def _outside(
        self,
        path: str,
        x: Tensor | None,
        dys: tuple[Tensor, ...],
        shared: Multiples | None,
        left: Collection[str],
        transposed: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of a layer's weight and bias, of both streams together; those that are `left` to autograd."""
        found: list[Tensor | None] = []
        for attribute in ("weight", "bias"):
            if attribute not in left:
                found.append(None)
                continue
            assert x is not None
            if attribute == "weight":
                if shared is None:
                    gradient = matrix_gradient(x, sum(dys[1:], start=dys[0]), transposed=transposed)
                else:
                    gradient = shared.weight_gradient(x, transposed=transposed)
            else:
                parts = [dy.sum(dim=tuple(range(dy.ndim - 1))) for dy in dys]
                gradient = sum(parts[1:], start=parts[0])
            parameter = cast(Tensor, getattr(self._modules[path], attribute))
            if self._pass != "off" and id(parameter) in self._tied:
                # autograd would wait for the parameter's use in a lower segment, which this pass does not come to
                gradient = gradient.to(parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
                found.append(None)
            else:
                found.append(gradient)
        return found[0], found[1]

    def _measure(self, members: Mapping[str, str], x: Tensor, dys: tuple[Tensor, ...], transposed: bool) -> None:
        for attribute, name in members.items():

            def products(dys: tuple[Tensor, ...], attribute: str = attribute) -> Products:
                if attribute == "bias":
                    return bias_products(dys, self._strata)
                return weight_products(x, dys, self._strata, transposed=transposed, workspace=self._workspace)

            parameter = self._parameters[name]
            found = in_range(products, dys)
            self._pulled.response[:, :, self._index[name]] = found.response
            self._pulled.stratum[:, :, self._index[name]] = found.stratum
            for total, part in zip(self._pulled.totals, found.totals, strict=True):
                total[name] = reduce_scatter(part.to(total_dtype(parameter)), parameter)


def _version(grad: Tensor | None) -> tuple[int, int] | None:
    return None if grad is None else (id(grad), local(grad)._version)
