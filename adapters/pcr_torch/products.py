"""Gradient of one linear layer, with the inner products of its per-response and per-stratum parts.

Response i contributes G_i = L_i^T R_i, a sum over its tokens, with (L, R) the output's gradient and the input (or the
other way round, by how the weight is stored). Two ways, chosen by a count of operations:

- explicit: form every G_i, take its products while it is in cache, add it into the sum. No extra matrix product.
- gram: <G_i, H_i> = sum of (X_i X_i^T) * (dY_i dZ_i^T), matrices of tokens x tokens; wins for short responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcr_torch.pullback import PAIRS, wide_dtype

_WORKSPACE = 1 << 25  # elements of explicit gradients held at once on an accelerator
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
    stratum = torch.zeros(len(pairs), len(strata), dtype=wide, device=x.device)
    totals: list[Tensor] = []
    for q, rows in enumerate(strata):
        part = list(rows)
        sums = [_single(matrix_gradient(x[part], dy[part], transposed=transposed)) for dy in dys]
        for pair, (a, b) in enumerate(pairs):
            stratum[pair, q] = row_dot(sums[a], sums[b]).sum()
        totals = _added(totals, sums)
    return Products(totals, response, stratum)


def _explicit(x: Tensor, dys: Sequence[Tensor], strata: Sequence[Sequence[int]], transposed: bool) -> Products:
    pairs = PAIRS[len(dys)]
    n, shape = x.shape[0], (x.shape[2], dys[0].shape[2]) if transposed else (dys[0].shape[2], x.shape[2])
    wide = wide_dtype(x.device)
    response = torch.zeros(len(pairs), n, dtype=wide, device=x.device)
    stratum = torch.zeros(len(pairs), len(strata), dtype=wide, device=x.device)
    # on a CPU one gradient at a time stays in cache; an accelerator wants large launches
    chunk = 1 if x.device.type == "cpu" else max(1, _WORKSPACE // (shape[0] * shape[1]))
    scratch = [torch.empty((chunk, *shape), dtype=x.dtype, device=x.device) for _ in dys]
    totals: list[Tensor] = []
    for q, rows in enumerate(strata):
        sums = [torch.zeros(shape, dtype=_single(x[:0]).dtype, device=x.device) for _ in dys]
        for start in range(0, len(rows), chunk):
            part = list(rows[start : start + chunk])
            held = [s[: len(part)] for s in scratch]
            for one, dy in zip(held, dys, strict=True):
                left, right = (x, dy) if transposed else (dy, x)
                torch.bmm(left[part].mT, right[part], out=one)
            for pair, (a, b) in enumerate(pairs):
                response[pair, part] = row_dot(held[a], held[b]).sum(dim=1)
            for total, one in zip(sums, held, strict=True):
                total.add_(one[0] if len(part) == 1 else one.sum(dim=0))
        for pair, (a, b) in enumerate(pairs):
            stratum[pair, q] = row_dot(sums[a], sums[b]).sum()
        totals = _added(totals, sums)
    return Products(totals, response, stratum)


def _added(totals: list[Tensor], sums: list[Tensor]) -> list[Tensor]:
    return [total.add_(part) for total, part in zip(totals, sums, strict=True)] if totals else sums
