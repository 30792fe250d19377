"""Which way is taken, by the device and what is installed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pcr_torch.kernels import plain
from pcr_torch.kernels.layout import Layout
from pcr_torch.products import Products
from pcr_torch.pullback import PAIRS, wide_dtype

_log = logging.getLogger("pcr_torch")
FUSED = (torch.float16, torch.bfloat16, torch.float32)
_SMALLEST = 1 << 17  # elements of a weight; below, too few programs run to fill a device


def serve(device: torch.device) -> bool:
    """Whether this package is for a device; a CPU has `pcr_torch.cpu`."""
    return device.type != "cpu"


def chosen(device: torch.device) -> str:
    """What measures a device's gradients, for logs and reports: "triton", or "plain torch (why not triton)"."""
    why = _why_not(device)
    return "triton" if why is None else f"plain torch ({why})"


@cache
def _log_once(device: torch.device) -> None:
    _log.info("products of gradients on %s are formed by %s", device, chosen(device))


def weight_products(
    x: Tensor,
    dys: Sequence[Tensor],
    layout: Layout,
    *,
    transposed: bool,
    into: Sequence[Tensor] | None = None,
    way: str | None = None,
    workspace: int = plain.WORKSPACE,
) -> Products:
    """A linear layer's weight gradient per stream, with inner products of its per-response and per-stratum parts.

    Sums are float32, and float64 across tiles of the weight. Numbers of any size keep their products; what is not
    finite makes them so. Nothing waits for the device.

    Args:
        x: (..., inputs) the layer's input, of which `layout` knows the rows; any floating dtype.
        dys: of one or two streams, (..., outputs) gradients of its output.
        layout: which rows are of which response.
        transposed: whether the weight is stored (inputs, outputs).
        into: of each stream, the total to which its gradient is added, in the weight's shape; else made.
        way: "triton" or "plain torch"; else `chosen`.
        workspace: numbers of explicit per-response gradients that the plain path holds at once.

    Returns:
        The gradients, float32 or wider where they are made, and float64 inner products.

    Example:
        Of two responses of one token each, which are one group:

        >>> x, dy = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]), torch.tensor([[[3.0]], [[1.0]]])
        >>> layout = Layout.even(2, 1, [[0, 1]], x.device)
        >>> found = weight_products(x, [dy], layout, transposed=False)
        >>> found.totals, found.response.tolist(), found.stratum.tolist()
        ([tensor([[3., 2.]])], [[9.0, 4.0]], [[13.0]])
    """
    _log_once(x.device)
    x, *gradients = _rows([x.detach(), *dys])
    n, outputs = layout.responses, gradients[0].shape[1]
    shape = (x.shape[1], outputs) if transposed else (outputs, x.shape[1])
    if not len(x):
        return Products(*_zeros([shape] * len(dys), x, layout, into))
    fused = chosen(x.device) == "triton" and x.shape[1] * outputs >= _SMALLEST if way is None else way == "triton"
    if fused and x.dtype in FUSED and all(total.is_contiguous() for total in into or ()):
        totals = [x.new_empty(shape, dtype=torch.float32) for _ in dys] if into is None else list(into)
        products = _kernels().weight_products(x, gradients, layout, totals, transposed=transposed, add=into is not None)
        return Products(totals, products[:, :n], products[:, n:])
    found, products = plain.weight_products(x, gradients, layout, transposed=transposed, workspace=workspace)
    return Products(_added(found, into), products[:, :n], products[:, n:])


def vector_products(dys: Sequence[Tensor], layout: Layout, *, into: Sequence[Tensor] | None = None) -> Products:
    """The same of the layer's bias, whose gradient is the sum over the rows."""
    gradients = _rows(dys)
    if not len(gradients[0]):
        return Products(*_zeros([dy.shape[1:] for dy in gradients], gradients[0], layout, into))
    found, products = plain.vector_products(gradients, layout)
    n = layout.responses
    return Products(_added(found, into), products[:, :n], products[:, n:])


def _rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """(..., features) -> (rows, features), of one dtype, each row dense."""
    dtype = tensors[0].dtype
    for other in tensors[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    flat = [t.resolve_neg().to(dtype).reshape(-1, t.shape[-1]) for t in tensors]
    return [t if t.stride(1) == 1 else t.contiguous() for t in flat]


def _zeros(
    shapes: Sequence[Sequence[int]], like: Tensor, layout: Layout, into: Sequence[Tensor] | None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of no rows."""
    pairs, wide = len(PAIRS[len(shapes)]), wide_dtype(like.device)
    single = torch.promote_types(like.dtype, torch.float32)
    totals = [like.new_zeros(tuple(shape), dtype=single) for shape in shapes] if into is None else list(into)
    response, stratum = (like.new_zeros((pairs, k), dtype=wide) for k in (layout.responses, len(layout.strata)))
    return totals, response, stratum


def _added(parts: list[Tensor], into: Sequence[Tensor] | None) -> list[Tensor]:
    return parts if into is None else [total.add_(part) for total, part in zip(into, parts, strict=True)]


@cache
def _why_not(device: torch.device) -> str | None:
    """Why Triton does not run on a device, if it does not."""
    if device.type != "cuda":
        return f"Triton kernels are for CUDA, not {device.type}"
    if find_spec("triton") is None:
        return "triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:
        return f"compute capability {major}.{minor} is below 8.0"
    return None


def _kernels() -> Any:
    return import_module("pcr_torch.kernels.triton_weights")
