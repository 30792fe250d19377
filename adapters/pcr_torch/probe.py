"""The fast pullback: linear layers whose backward pass also measures per-response gradients.

A probed layer computes its output with a detached weight and passes it through an identity that knows the layer's
input. When the output's gradient arrives there, the weight's gradient and its per-response inner products are formed in
one place: per stratum one matrix product C_q (their sum is the ordinary gradient), per response a Gram product of T x T
matrices or the explicit (out, in) gradients, whichever is less work. Two passes over one graph give both streams; the
first only keeps the output gradients, so that inner products between the streams can be taken in the second.

Activations are saved through autograd, so gradient checkpointing, autocast and saved-tensor hooks work as always.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pcr_torch.pullback import PAIRS, Pulled, total_dtype, wide_dtype

_WORKSPACE = 1 << 25  # elements of per-response gradients held at once
Layout = Literal["out_in", "in_out"]


def layout(module: nn.Module) -> Layout | None:
    """How a plain linear layer stores its weight; None for any other module."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return "out_in"
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "in_out"
    return None


class Recorder:
    """Installs probes on the layers that hold block parameters, and collects what they measure."""

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._index = {name: k for k, name in enumerate(parameters)}
        self._pass: Literal["off", "keep", "measure"] = "off"
        self._strata: Sequence[Tensor] = ()
        self._kept: dict[str, Tensor] = {}
        self._seen: set[str] = set()
        self._modules: dict[str, nn.Module] = {}
        self._names = {id(p): name for name, p in parameters.items()}
        covered: set[str] = set()
        for path, module in model.named_modules():
            mine = self._members(module)
            if mine and layout(module) is not None:
                self._modules[path] = module
                covered.update(self._names[id(p)] for p in mine)
        self.uncovered = tuple(name for name in parameters if name not in covered)

    def install(self) -> None:
        for path, module in self._modules.items():
            module.forward = MethodType(_probed_forward(self, path), module)

    def remove(self) -> None:
        for module in self._modules.values():
            module.__dict__.pop("forward", None)

    def pull(self, logp: Tensor, cotangents: Sequence[Tensor], strata: Sequence[Tensor]) -> Pulled:
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
            for stream, cotangent in enumerate(cotangents):
                last = stream == len(cotangents) - 1
                self._pass = "measure" if last else "keep"
                self._seen.clear()
                torch.autograd.backward(logp, cotangent, retain_graph=not last)
            if self._kept:
                raise RuntimeError(f"the two backward passes saw different layers: {sorted(self._kept)}")
            self._refuse_bypass(before)
            return self._pulled
        finally:
            self._pass = "off"
            self._kept.clear()
            del self._pulled

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
        if self._pass == "off":
            return _matrix_gradient(module, x, dy), dy.sum(dim=tuple(range(dy.ndim - 1)))
        if path in self._seen:
            raise ValueError(f"{path} is used twice in one forward pass; use PCR(..., norms='loop')")
        self._seen.add(path)
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
                self._measure(module, x, outputs)
        return None, None

    def _measure(self, module: nn.Module, x: Tensor, dys: tuple[Tensor, ...]) -> None:
        scaled = [_unit_scale(dy) for dy in dys]
        dys, scales = tuple(dy for dy, _ in scaled), [scale for _, scale in scaled]
        for parameter in self._members(module):
            name = self._names[id(parameter)]
            k = self._index[name]
            is_bias = parameter.ndim == 1
            for pair, (a, b) in enumerate(PAIRS[len(dys)]):
                dots = _row_dot(dys[a].sum(1), dys[b].sum(1)) if is_bias else _response_dots(x, dys[a], dys[b])
                self._pulled.response[pair, :, k] = dots * scales[a] * scales[b]
            for q, rows in enumerate(self._strata):
                sums = [
                    dy[rows].sum(dim=(0, 1)) if is_bias else _matrix_gradient(module, x[rows], dy[rows]) for dy in dys
                ]
                for pair, (a, b) in enumerate(PAIRS[len(dys)]):
                    self._pulled.stratum[pair, q, k] = _row_dot(sums[a], sums[b]).sum() * scales[a] * scales[b]
                for total, part, scale in zip(self._pulled.totals, sums, scales, strict=True):
                    wide = part.to(total_dtype(parameter))
                    wide = wide * scale.to(wide.dtype)
                    total[name] = total[name].add_(wide) if name in total else wide

    def _members(self, module: nn.Module) -> list[nn.Parameter]:
        """The module's own parameters that belong to blocks."""
        return [p for p in module.parameters(recurse=False) if id(p) in self._names]


def _version(grad: Tensor | None) -> tuple[int, int] | None:
    return None if grad is None else (id(grad), grad._version)


def _probed_forward(recorder: Recorder, path: str) -> Any:
    def forward(module: Any, x: Tensor) -> Tensor:
        ours = {id(p) for p in recorder._members(module)}
        weight = module.weight if id(module.weight) in ours else None
        bias = module.bias if id(module.bias) in ours else None
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

    return forward


class _Probe(torch.autograd.Function):
    """Identity on y that hands (x, dy) to the recorder."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, recorder: Recorder, path: str
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.recorder, ctx.path = recorder, path
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (x,) = ctx.saved_tensors
        (dy,) = grad_outputs
        weight, bias = ctx.recorder._arrived(ctx.path, x, dy)
        _, _, wants_weight, wants_bias, _, _ = ctx.needs_input_grad
        return dy, None, weight if wants_weight else None, bias if wants_bias else None, None, None


def _unit_scale(t: Tensor) -> tuple[Tensor, Tensor]:
    """t over the power of two next to its largest entry, and that power: squares of tiny gradients stay in float32."""
    largest = t.abs().amax()
    usable = torch.isfinite(largest) & (largest > 0)
    exponent = torch.frexp(torch.where(usable, largest, torch.ones_like(largest)).float())[1]
    scale = torch.ldexp(torch.ones((), device=t.device), exponent)
    return (t / scale).to(t.dtype), scale.to(wide_dtype(t.device))


def _matrix_gradient(module: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    rows, outputs = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return outputs.T @ rows if layout(module) == "out_in" else rows.T @ outputs


def _row_dot(a: Tensor, b: Tensor) -> Any:
    """Inner products over the last axis: float32 within a row, float64 from there on."""
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    if a is b:
        return torch.linalg.vector_norm(a, dim=-1).to(wide_dtype(a.device)) ** 2
    return (a * b).sum(dim=-1).to(wide_dtype(a.device))


def _response_dots(x: Tensor, dy: Tensor, dz: Tensor) -> Tensor:
    """(n,) inner products of each response's weight gradients dy_i^T x_i and dz_i^T x_i."""
    n, length, features = x.shape
    outputs = dy.shape[-1]
    if length * (features + outputs) < features * outputs:
        x, dy, dz = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (x, dy, dz))
        gram = (x @ x.mT) * (dy @ dz.mT)
        return gram.to(wide_dtype(x.device)).sum(dim=(1, 2))
    chunk = max(1, _WORKSPACE // (features * outputs))
    parts = []
    for start, end in itertools.pairwise([*range(0, n, chunk), n]):
        g = dy[start:end].mT @ x[start:end]
        h = g if dz is dy else dz[start:end].mT @ x[start:end]
        parts.append(_row_dot(g, h).sum(dim=1))
    return torch.cat(parts)
