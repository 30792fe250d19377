"""Probes: linear layers whose backward pass gives input and output gradient to a receiver, which forms the gradients.

Activations are saved through autograd, so gradient checkpointing, autocast and saved-tensor hooks work as always.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

_LIKE_LINEAR = {("transformers.models.falcon.modeling_falcon", "FalconLinear")}  # the same product, written by hand
Layout = Literal["out_in", "in_out"]


class Receiver(Protocol):
    """What forms the gradients of probed layers: `recorder.Recorder`."""

    def arrived(
        self, node: Any, x: Tensor | None, weight: Tensor, dy: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias, where `wanted` and autograd's to have.

        Args:
            node: the call's, in autograd's graph; its `path` is the name of the layer.
            x: (..., in) its input; None where neither weight nor bias is trained.
            weight: as stored.
            dy: (..., out) gradient of its output.
            wanted: whether input, weight and bias are differentiated.
        """


def layout(module: nn.Module) -> Layout | None:
    """How a plain linear layer stores its weight; None for any other module, and where its `forward` was replaced."""
    own = module.__dict__.get("forward")
    restored = getattr(own, "__func__", None) is type(module).forward and getattr(own, "__self__", None) is module
    if own is not None and not (restored or _is_probed(module)):
        return None
    kind = (type(module).__module__, type(module).__name__)
    if isinstance(module, nn.Linear) and (type(module).forward is nn.Linear.forward or kind in _LIKE_LINEAR):
        return "out_in"
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "in_out"
    return None


def install(module: nn.Module, receiver: Receiver, path: str) -> None:
    """Puts a probe on a layer: replaces its `forward` until `remove`. Without gradients it computes as before."""
    module.forward = MethodType(_probed(receiver, path, transposed=layout(module) == "in_out"), module)


def remove(module: nn.Module, receiver: Receiver) -> None:
    """Takes the probe off a layer, unless it has another receiver by now, or other code has wrapped the probe."""
    if _is_probed(module) and module.__dict__["forward"].__func__.receiver is receiver:
        del module.__dict__["forward"]


def _is_probed(module: nn.Module) -> bool:
    return hasattr(getattr(module.__dict__.get("forward"), "__func__", None), "probes")


def _probed(receiver: Receiver, path: str, *, transposed: bool) -> Any:
    def forward(module: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return _linear(x, module.weight, module.bias, transposed)
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        probed = _Probe.apply(x, module.weight, module.bias, transposed, receiver, path)  # type: ignore[no-untyped-call]
        return cast(Tensor, probed)

    # a compiled graph would freeze the probe in the state it had when it was traced
    why = "the probes of PCR's fast path run uncompiled; for fullgraph=True use norms='loop'"
    probed = torch.compiler.disable(forward, reason=why)  # type: ignore[no-untyped-call]
    probed.probes, probed.receiver = path, receiver
    return probed


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return functional.linear(x, weight, bias)
    assert bias is not None
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


def is_probe(node: Any) -> bool:
    """Whether a node of an autograd graph is a probed layer; its inputs are the layer's input, weight and bias."""
    return getattr(node, "_forward_cls", None) is _Probe


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, receiver: Receiver, path: str
    ) -> Tensor:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None, weight)
        ctx.receiver, ctx.path = receiver, path
        return _linear(x, weight, bias, transposed).detach()  # not a view: what follows may go on in place

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weight = ctx.saved_tensors
        found = ctx.receiver.arrived(ctx, x, weight, grad_outputs[0], ctx.needs_input_grad[:3])
        return *found, None, None, None
