"""Gradient of one linear layer, with the inner products of its per-response and per-stratum parts: what devices share.

The explicit gradients of responses are formed in `cpu.py`, and in `kernels` on an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcr_torch.pullback import PAIRS, wide_dtype

_SAFE = (1e-20, 1e30)  # of the largest response's square: what float32 loses below and above does not count
_NEAR = (1e-8, 1e8)  # of numbers whose products, squared once more, stay in float32


@dataclass(frozen=True)
class Products:
    """Of one parameter: its gradient per stream, and inner products (pairs, n) of responses, (pairs, q) of strata."""

    totals: list[Tensor]
    response: Tensor
    stratum: Tensor


def bias_products(dys: Sequence[Tensor], strata: Sequence[Sequence[int]]) -> Products:
    """The same of its bias: G_i is the sum over tokens."""
    parts = [single(dy).sum(dim=1) for dy in dys]
    pairs = PAIRS[len(dys)]
    sums = [torch.stack([part[list(rows)].sum(dim=0) for rows in strata]) for part in parts]
    return Products(
        [s.sum(dim=0) for s in sums],
        torch.stack([row_dot(parts[a], parts[b]) for a, b in pairs]),
        torch.stack([row_dot(sums[a], sums[b]) for a, b in pairs]),
    )


def in_range(products: Callable[[tuple[Tensor, ...]], Products], dys: tuple[Tensor, ...]) -> Products:
    """`products(dys)`, of gradients scaled by powers of two where their squares would not stay in float32."""
    found = products(dys)
    largest = found.response.numpy()[: len(dys)].max(axis=1)
    if all(_SAFE[0] < square < _SAFE[1] or not dy.any() for square, dy in zip(largest, dys, strict=True)):
        return found
    scales = [_scale(dy) for dy in dys]
    found = products(tuple((dy / scale).to(dy.dtype) for dy, scale in zip(dys, scales, strict=True)))
    wide = [scale.to(wide_dtype(scale.device)) for scale in scales]
    factors = torch.stack([wide[a] * wide[b] for a, b in PAIRS[len(dys)]])[:, None]
    totals = [total.mul_(scale.to(total.dtype)) for total, scale in zip(found.totals, scales, strict=True)]
    return Products(totals, found.response * factors, found.stratum * factors)


def _scale(t: Tensor) -> Tensor:
    """A power of two next to the largest element; shape ()."""
    low, high = torch.aminmax(t)
    largest = torch.maximum(-low, high)
    usable = torch.isfinite(largest) & (largest > 0)
    exponent = torch.frexp(torch.where(usable, largest, torch.ones_like(largest)).float())[1]
    return torch.ldexp(torch.ones((), device=t.device), exponent)


def matrix_gradient(x: Tensor, dy: Tensor, *, transposed: bool) -> Tensor:
    """Gradient of the weight, summed over all leading dimensions."""
    rows, outputs = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return rows.T @ outputs if transposed else outputs.T @ rows


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last axis: float32 within a row, float64 from there on."""
    x = single(a)
    if a is b:
        squares: Tensor = torch.linalg.vector_norm(x, dim=-1).to(wide_dtype(x.device)) ** 2
        return squares
    return (x * single(b)).sum(dim=-1).to(wide_dtype(x.device))


def single(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t.resolve_neg()


def token_grams(tokens: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """(pairs, n) inner products of responses."""
    wide = wide_dtype(tokens.device)
    # squares of either factor may leave float32 where those of the gradient do not
    (x, scale), *near = (_near(t) for t in (tokens, *outputs))
    gram = x @ x.mT
    found = []
    for (one, one_scale), (other, other_scale) in ((near[a], near[b]) for a, b in PAIRS[len(outputs)]):
        products = (gram * (one @ other.mT)).to(wide).sum(dim=(1, 2))
        found.append(products * (scale.to(wide) ** 2 * one_scale.to(wide) * other_scale.to(wide)))
    return torch.stack(found)


def _near(t: Tensor) -> tuple[Tensor, Tensor]:
    """`t` by its scale, and that; as it is where a look at it costs less than a copy, and finds it near 1."""
    scale = _scale(t)
    if _NEAR[0] < scale < _NEAR[1]:
        return t, torch.ones_like(scale)
    return (t / scale).to(t.dtype), scale


def input_gradient(dy: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Gradient of a linear layer's input."""
    matrix = weight.to(dy.dtype)
    return dy @ (matrix.T if transposed else matrix)


def parameter_gradients(
    x: Tensor | None, dy: Tensor, left: Collection[str], transposed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a layer's weight and bias, those that are `left` to autograd."""
    weight = bias = None
    if "weight" in left:
        assert x is not None
        weight = matrix_gradient(x, dy, transposed=transposed)
    if "bias" in left:
        bias = dy.reshape(-1, dy.shape[-1]).sum(dim=0)
    return weight, bias
