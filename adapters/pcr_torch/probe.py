"""The fast pullback: linear layers whose backward pass also measures per-response gradients.

A probed layer computes its output with a detached weight and passes it through an identity that knows the layer's
input. When the output's gradient arrives there, the weight's gradient and its per-response inner products are formed in
one place (`products.py`). Two passes, a layer at a time (`segments.py`), give both streams; the first only keeps the
output gradients, so that each weight's gradient is formed once, in the second pass, and inner products between the
streams can be taken.

Linear layers outside the blocks are probed as well, to form the gradient of the summed stream once in place of twice.
Activations are saved through autograd, so gradient checkpointing, autocast and saved-tensor hooks work as always.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from pcr_torch.distributed import kept_whole, local, reduce_scatter
from pcr_torch.products import WORKSPACE, bias_products, matrix_gradient, weight_products
from pcr_torch.pullback import PAIRS, Pulled, total_dtype, wide_dtype
from pcr_torch.segments import Cuts, layers_of, segments

Layout = Literal["out_in", "in_out"]
_WIDEST = 8  # outputs over inputs; a vocabulary's output gradient is not worth keeping between the passes


def layout(module: nn.Module) -> Layout | None:
    """How a plain linear layer stores its weight; None for any other module."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return "out_in"
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "in_out"
    return None


class Recorder:
    """Installs probes on the model's linear layers, and collects what they measure on block parameters."""

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter], workspace: int = WORKSPACE) -> None:
        self._model = model
        self._parameters = parameters
        self._workspace = workspace
        self._index = {name: k for k, name in enumerate(parameters)}
        self._pass: Literal["off", "keep", "measure"] = "off"
        self._strata: Sequence[Sequence[int]] = ()
        self._kept: dict[str, Tensor] = {}
        self._seen: set[tuple[str, str]] = set()
        self._tied: set[int] = set()  # weights that layers of several segments share
        # FSDP schedules its gathering by whole backward passes
        sharded = any(isinstance(p, DTensor) for p in parameters.values())
        self._cuts = Cuts(*(([], None) if sharded else layers_of(model, list(parameters))))
        self._modules: dict[str, nn.Module] = {}
        # by attribute and not by identity: sharding libraries swap the parameters of a module around its forward
        self._members: dict[str, dict[str, str]] = {}
        names = {id(p): name for name, p in parameters.items()}
        uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        for path, module in model.named_modules():
            mine = {at: names[id(p)] for at, p in module.named_parameters(recurse=False) if id(p) in names}
            if layout(module) is not None and (mine or _is_worthwhile(module, uses)):
                self._modules[path] = module
                self._members[path] = mine
        # a tied weight's gradient has parts from several layers, and its norms need their sum
        found = {name for mine in self._members.values() for name in mine.values()}
        self.uncovered = tuple(n for n, p in parameters.items() if n not in found or uses[id(p)] > 1)

    def install(self) -> None:
        for path, module in self._modules.items():
            module.forward = MethodType(_probed_forward(self, path), module)
        self._cuts.install()

    def remove(self) -> None:
        self._cuts.remove()
        for module in self._modules.values():
            module.__dict__.pop("forward", None)

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

    def _arrived(self, path: str, x: Tensor, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Called where the gradient of a layer's output arrives; the weight's and bias's gradient, if autograd's."""
        module = self._modules[path]
        transposed = layout(module) == "in_out"
        members = self._members[path]
        if self._pass == "off":
            return matrix_gradient(x, dy, transposed=transposed), dy.sum(dim=tuple(range(dy.ndim - 1)))
        if not members:
            return self._outside(path, x, dy, transposed), None
        if (self._pass, path) in self._seen:
            raise ValueError(f"{path} is used twice in one forward pass; use PCR(..., norms='loop')")
        self._seen.add((self._pass, path))
        n = self._pulled.response.shape[1]
        if x.ndim != 3 or x.shape[0] != n:
            raise ValueError(
                f"{path} got input of shape {tuple(x.shape)}; the fast path expects ({n}, tokens, features), a row a "
                "response. Packed batches and routed experts need PCR(..., norms='loop')"
            )
        if self._pass == "keep":
            self._kept[path] = dy
        else:
            outputs = (self._kept.pop(path), dy) if len(self._pulled.totals) == 2 else (dy,)
            with torch.no_grad():
                self._measure(members, x, outputs, transposed)
        return None, None

    def _outside(self, path: str, x: Tensor, dy: Tensor, transposed: bool) -> Tensor | None:
        """Gradient of the streams' sum, for a weight outside the blocks: in the second pass, with what the first kept.

        Of a layer that is called several times the first call is treated so (both passes come to calls in one order),
        the others in either pass as autograd would.
        """
        weight = cast(Tensor, self._modules[path].weight)
        if self._pass == "keep" and ("keep", path) not in self._seen and _is_narrow(weight):
            self._seen.add(("keep", path))
            self._kept[path] = dy
            return None
        kept = self._kept.pop(path, None) if self._pass == "measure" else None
        gradient = matrix_gradient(x, dy if kept is None else dy + kept, transposed=transposed)
        if id(weight) not in self._tied:
            return gradient
        # autograd would wait for the weight's use in a lower segment, which this pass does not come to
        gradient = gradient.to(weight.dtype)
        weight.grad = gradient if weight.grad is None else gradient.add_(weight.grad)
        return None

    def _measure(self, members: dict[str, str], x: Tensor, dys: tuple[Tensor, ...], transposed: bool) -> None:
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


def _is_worthwhile(module: nn.Module, uses: Counter[int]) -> bool:
    """Whether a layer outside the blocks is probed: to form its gradient once, or because another module shares it."""
    weight = cast(Tensor, module.weight)
    return weight.requires_grad and (_is_narrow(weight) or uses[id(weight)] > 1)


def _is_narrow(weight: Tensor) -> bool:
    return max(weight.shape) <= _WIDEST * min(weight.shape)


def _version(grad: Tensor | None) -> tuple[int, int] | None:
    return None if grad is None else (id(grad), local(grad)._version)


def _probed_forward(recorder: Recorder, path: str) -> Any:
    def forward(module: Any, x: Tensor) -> Tensor:
        ours = recorder._members[path]
        bias = module.bias if "bias" in ours else None
        weight = module.weight if not ours or "weight" in ours else None
        fixed_weight = module.weight if weight is None else weight.detach()
        fixed_bias = module.bias if bias is None else bias.detach()
        if layout(module) == "out_in":
            y = functional.linear(x, fixed_weight, fixed_bias)
        else:
            y = torch.addmm(fixed_bias, x.reshape(-1, x.shape[-1]), fixed_weight)
            y = y.view(*x.shape[:-1], fixed_weight.shape[1])
        if not torch.is_grad_enabled():
            return y
        probed = _Probe.apply(y, x.detach().to(y.dtype), weight, bias, recorder, path)  # type: ignore[no-untyped-call]
        return cast(Tensor, probed)

    # a compiled graph would freeze the probe in the state it had when it was traced
    why = "the probes of PCR's fast path run uncompiled; for fullgraph=True use norms='loop'"
    return torch.compiler.disable(forward, reason=why)  # type: ignore[no-untyped-call]


_SAFE = (1e-12, 1e12)


class _Probe(torch.autograd.Function):
    """Identity on y that hands (x, dy) to the recorder."""

    is_probe = True

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, recorder: Recorder, path: str
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.recorder, ctx.path = recorder, path
        return y.detach()  # not a view: what follows may go on in place

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (x,) = ctx.saved_tensors
        (dy,) = grad_outputs
        weight, bias = ctx.recorder._arrived(ctx.path, x, dy)
        _, _, wants_weight, wants_bias, _, _ = ctx.needs_input_grad
        return dy, None, weight if wants_weight else None, bias if wants_bias else None, None, None


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
