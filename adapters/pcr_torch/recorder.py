"""The fast pullback: both streams' gradients and their per-response inner products from two backward passes.

Where the gradient of a probed layer's output arrives (`probe.py`), the weight's gradient and its per-response inner
products are formed in one place (`products.py`). Two passes, a layer at a time (`segments.py`), give both streams; the
first only keeps the output gradients, so that each weight's gradient is formed once, in the second pass, and inner
products between the streams can be taken. Above the last attention the second stream needs no products of its own to
come down (`rows.py`).

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
from pcr_torch.products import WORKSPACE, bias_products, matrix_gradient, weight_products
from pcr_torch.pullback import PAIRS, Pulled, total_dtype, wide_dtype
from pcr_torch.rows import input_gradient
from pcr_torch.segments import Cuts, layers_of, lies_on_top, segments


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
        # FSDP schedules its gathering by whole backward passes
        sharded = any(isinstance(p, DTensor) for p in parameters.values())
        self._cuts = Cuts(*(([], None) if sharded else layers_of(model, list(parameters))))
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
        self._cuts.install()

    def remove(self) -> None:
        self._cuts.remove()
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
            del self._pulled

    def _through(self, logp: Tensor, gradients: Sequence[Tensor]) -> None:
        """The streams' backward passes, segment by segment; as one below the last segment with blocks."""
        chain = segments(logp, self._cuts)
        held = [segment.leaves | segment.probed for segment in chain]
        ours = {id(parameter) for parameter in self._parameters.values()}
        # blocks that are not seen may hide in a node that keeps its graph to itself, as reentrant checkpointing does
        hidden = not ours <= frozenset().union(*held)
        for k, segment in enumerate(chain):
            self._tied |= segment.probed & frozenset().union(*held[k + 1 :])
        for k, segment in enumerate(chain):
            if not hidden and not any(ours & each for each in held[k:]):
                gradients = [sum(gradients[1:], start=gradients[0])]
            arrived = []
            for stream, gradient in enumerate(gradients):
                last = stream == len(gradients) - 1
                self._pass = "measure" if last else "keep"
                with nullcontext() if last else kept_whole(self._model):
                    arrived.append(self._cuts.back(segment, logp, gradient, keep=not last))
            gradients = [gradient for gradient in arrived if gradient is not None]

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
            dx = back(dy) if wanted[0] else None
            self._kept[path] = _Kept(dy, dx if path in self._top else None)
            return dx, None, None
        kept = None if again else self._kept.pop(path, None)
        dx = None
        if wanted[0]:
            first = None if kept is None or kept.dx is None else (kept.dy, kept.dx)
            dx = input_gradient(dy, back, first)
        if members:
            assert x is not None
            with torch.no_grad():
                self._measure(members, x, (dy,) if kept is None else (kept.dy, dy), transposed)
        left = [name for name, want in zip(("weight", "bias"), wanted[1:], strict=True) if want and name not in members]
        return dx, *self._outside(path, x, dy if kept is None or not left else dy + kept.dy, left, transposed)

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
        self, path: str, x: Tensor | None, dy: Tensor, left: Collection[str], transposed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of a layer's weight and bias, those of them that are `left` to autograd."""
        found: list[Tensor | None] = []
        for attribute in ("weight", "bias"):
            if attribute not in left:
                found.append(None)
                continue
            assert x is not None
            if attribute == "weight":
                gradient = matrix_gradient(x, dy, transposed=transposed)
            else:
                gradient = dy.sum(dim=tuple(range(dy.ndim - 1)))
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
        scaled = [_unit_scale(dy) for dy in dys]
        dys, scales = tuple(dy for dy, _ in scaled), [scale for _, scale in scaled]
        factors = torch.stack([scales[a] * scales[b] for a, b in PAIRS[len(dys)]])[:, None]
        for attribute, name in members.items():
            parameter = self._parameters[name]
            products = (
                bias_products(dys, self._strata)
                if attribute == "bias"
                else weight_products(x, dys, self._strata, transposed=transposed, workspace=self._workspace)
            )
            self._pulled.response[:, :, self._index[name]] = products.response * factors
            self._pulled.stratum[:, :, self._index[name]] = products.stratum * factors
            for total, part, scale in zip(self._pulled.totals, products.totals, scales, strict=True):
                part = part.to(total_dtype(parameter))
                whole = part if scale.device.type == "cpu" and scale == 1 else part.mul_(scale.to(part.dtype))
                total[name] = reduce_scatter(whole, parameter)


def _version(grad: Tensor | None) -> tuple[int, int] | None:
    return None if grad is None else (id(grad), local(grad)._version)


_SAFE = (1e-12, 1e12)


def _unit_scale(t: Tensor) -> tuple[Tensor, Tensor]:
    """t over a power of two, and that power, so that squares of tiny or huge gradients stay in float32."""
    if t.device.type == "cpu":
        low, high = torch.aminmax(t)
        if _SAFE[0] < max(-low.item(), high.item()) < _SAFE[1]:  # nearly always, and saves a copy
            return t, torch.ones((), dtype=torch.float64)
    largest = t.abs().amax()
    usable = torch.isfinite(largest) & (largest > 0)
    exponent = torch.frexp(torch.where(usable, largest, torch.ones_like(largest)).float())[1]
    scale = torch.ldexp(torch.ones((), device=t.device), exponent)
    return (t / scale).to(t.dtype), scale.to(wide_dtype(t.device))
