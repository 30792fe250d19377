"""Gradient of one linear layer, with the inner products of its per-response and per-stratum parts.

Response i contributes G_i = L_i^T R_i, a sum over its tokens, with (L, R) the output's gradient and the input (or the
other way round, by how the weight is stored). Two ways, chosen by a count of operations:

- explicit: form every G_i, take its products while it is in cache, add it into the sum. No extra matrix product.
- gram: <G_i, H_i> = sum of (X_i X_i^T) * (dY_i dZ_i^T), matrices of tokens x tokens; wins for short responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pcr_torch.pullback import PAIRS, wide_dtype

_WORKSPACE = 1 << 25  # elements of explicit gradients held at once on an accelerator
_PART = 1 << 16  # a float32 dot product of this length errs by 1e-7, and stays in a core's cache
_GRAM_COST = 16  # multiply-adds that a pass over one explicit element is worth; measured on a CPU


@dataclass(frozen=True)
class Products:
    """Of one parameter: its gradient per stream, and inner products (pairs, n) of responses, (pairs, q) of strata."""

    totals: list[Tensor]
    response: Tensor
    stratum: Tensor


def weight_products(x: Tensor, dys: Sequence[Tensor], strata: Sequence[Sequence[int]], *, transposed: bool) -> Products:
    """Products of a linear layer's weight.

    Args:
        x: (n, T, in) the layer's input.
        dys: one or two (n, T, out) gradients of its output.
        strata: rows of each stratum, together 0 to n - 1.
        transposed: whether the weight is stored (in, out).
    """
    if prefers_gram(x.shape[1], x.shape[2], dys[0].shape[2], len(dys)):
        return _gram(x, dys, strata, transposed)
    return _explicit(x, dys, strata, transposed)


def bias_products(dys: Sequence[Tensor], strata: Sequence[Sequence[int]]) -> Products:
    """The same of its bias: G_i is the sum over tokens."""
    parts = [_single(dy).sum(dim=1) for dy in dys]
    pairs = PAIRS[len(dys)]
    sums = [torch.stack([part[list(rows)].sum(dim=0) for rows in strata]) for part in parts]
    return Products(
        [s.sum(dim=0) for s in sums],
        torch.stack([row_dot(parts[a], parts[b]) for a, b in pairs]),
        torch.stack([row_dot(sums[a], sums[b]) for a, b in pairs]),
    )


def prefers_gram(length: int, features: int, outputs: int, streams: int) -> bool:
    """Whether token Grams cost less than passes over explicit gradients."""
    return length**2 * (features + len(PAIRS[streams]) * outputs) < _GRAM_COST * features * outputs


def matrix_gradient(x: Tensor, dy: Tensor, *, transposed: bool) -> Tensor:
    """Gradient of the weight, summed over all leading dimensions."""
    rows, outputs = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return rows.T @ outputs if transposed else outputs.T @ rows


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last axis: float32 within a row, float64 from there on."""
    x = _single(a)
    if a is b:
        squares: Tensor = torch.linalg.vector_norm(x, dim=-1).to(wide_dtype(x.device)) ** 2
        return squares
    return (x * _single(b)).sum(dim=-1).to(wide_dtype(x.device))


def _single(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _gram(x: Tensor, dys: Sequence[Tensor], strata: Sequence[Sequence[int]], transposed: bool) -> Products:
    pairs = PAIRS[len(dys)]
    wide = wide_dtype(x.device)
    tokens, outputs = _single(x), [_single(dy) for dy in dys]
    gram = tokens @ tokens.mT
    response = torch.stack([(gram * (outputs[a] @ outputs[b].mT)).to(wide).sum(dim=(1, 2)) for a, b in pairs])
    stratum: list[Tensor] = []
    totals: list[Tensor] = []
    for rows in strata:
        part = list(rows)
        sums = [_single(matrix_gradient(x[part], dy[part], transposed=transposed)) for dy in dys]
        stratum.append(_pair_products(sums))
        totals = _add(totals, sums) if totals else sums
    return Products(totals, response, torch.stack(stratum, dim=1))


def _explicit(x: Tensor, dys: Sequence[Tensor], strata: Sequence[Sequence[int]], transposed: bool) -> Products:
    n, shape = x.shape[0], (x.shape[2], dys[0].shape[2]) if transposed else (dys[0].shape[2], x.shape[2])
    form = _form_one_by_one if x.device.type == "cpu" else _form_in_chunks
    response: list[Tensor | None] = [None] * n
    stratum: list[Tensor] = []
    totals = [torch.empty(shape, dtype=_single(x[:0]).dtype, device=x.device) for _ in dys]
    scratch = [torch.empty_like(total) for total in totals] if len(strata) > 1 else []
    for q, rows in enumerate(strata):
        into = scratch if q else totals
        for row, products in zip(rows, form(x, dys, rows, transposed, into), strict=True):
            response[row] = products
        stratum.append(_pair_products(into))
        if q:
            _add(totals, into)
    return Products(totals, torch.stack(cast(list[Tensor], response), dim=1), torch.stack(stratum, dim=1))


def _form_one_by_one(
    x: Tensor, dys: Sequence[Tensor], rows: Sequence[int], transposed: bool, into: list[Tensor]
) -> list[Tensor]:
    """Products of each row's gradients, whose sum comes to lie in `into`; one at a time stays in a CPU's cache."""
    x, dys = _single(x), [_single(dy) for dy in dys]
    scratch = [torch.empty_like(total) for total in into]
    products = []
    for k, row in enumerate(rows):
        held = into if k == 0 else scratch
        for one, dy in zip(held, dys, strict=True):
            left, right = (x, dy) if transposed else (dy, x)
            torch.mm(left[row].mT, right[row], out=one)
        products.append(_pair_products(held))
        if k:
            _add(into, scratch)
    return products


def _form_in_chunks(
    x: Tensor, dys: Sequence[Tensor], rows: Sequence[int], transposed: bool, into: list[Tensor]
) -> list[Tensor]:
    """The same in batched products, for an accelerator, whose launches want to be large."""
    chunk = max(1, _WORKSPACE // into[0].numel())
    products: list[Tensor] = []
    for start in range(0, len(rows), chunk):
        part = list(rows[start : start + chunk])
        held = []
        for total, dy in zip(into, dys, strict=True):
            left, right = (x, dy) if transposed else (dy, x)
            one = torch.bmm(left[part].mT, right[part])
            total.copy_(one.sum(dim=0)) if start == 0 else total.add_(one.sum(dim=0))
            held.append(one)
        products += torch.stack([row_dot(held[a], held[b]).sum(dim=1) for a, b in PAIRS[len(dys)]], dim=1).unbind()
    return products


def _pair_products(held: Sequence[Tensor]) -> Tensor:
    """(pairs,) inner products of one gradient per stream: float32 within a part, float64 from there on."""
    flat = [t.view(-1) for t in held]
    pairs = [(flat[a], flat[b]) for a, b in PAIRS[len(held)]]
    if flat[0].device.type != "cpu":
        return torch.stack([row_dot(a, b) for a, b in pairs])
    parts = [[torch.dot(p, q) for p, q in zip(torch.split(a, _PART), torch.split(b, _PART))] for a, b in pairs]
    return torch.stack([torch.stack(part).double().sum() for part in parts])


def _add(totals: list[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    for total, part in zip(totals, parts, strict=True):
        total.add_(part)
    return totals
