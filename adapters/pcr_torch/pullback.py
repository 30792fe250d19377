"""From cotangents on logp to gradients and their per-response inner products: the reference implementation.

`per_response` runs one backward pass per response and stream. It is the definition that the fast path (`recorder.py`)
is tested against, and what remains when a block is not an ordinary linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PAIRS = {1: ((0, 0),), 2: ((0, 0), (1, 1), (0, 1))}
Total = dict[str, Tensor]  # a stream's gradient of each block parameter; absent where that was not used
_CHUNK = 1 << 16  # float64 copies of a chunk stay in a cache, and in memory that malloc need not ask for each time


@dataclass(frozen=True)
class Pulled:
    """Inner products of what one micro-batch contributes, for one stream or for two that share their responses.

    Attributes:
        response: (pairs, n, parameters) float64, inner products of each response's contributions to each parameter; the
            pairs of streams are (0, 0), or (0, 0), (1, 1), (0, 1).
        stratum: (pairs, q, parameters) the same for each stratum's summed contribution.
    """

    response: Tensor
    stratum: Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b>, accumulated in float64 (products exact for float32 input), a chunk at a time; shape ()."""
    x, y = a.detach().reshape(-1), b.detach().reshape(-1)
    dtype = wide_dtype(x.device)
    total = torch.zeros((), dtype=dtype, device=x.device)
    for start in range(0, x.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        total += torch.dot(x[part].to(dtype), y[part].to(dtype))
    return total


def total_dtype(parameter: Tensor) -> torch.dtype:
    """Totals of half-precision parameters are summed in float32."""
    return parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32


def per_response(
    logp: Tensor,
    cotangents: Sequence[Tensor],
    parameters: dict[str, nn.Parameter],
    strata: Sequence[Sequence[int]],
    totals: Sequence[Total],
) -> Pulled:
    """One backward pass per response and stream; keeps the graph.

    Args:
        logp: (n, T) with a graph.
        cotangents: one or two of shape (n, T).
        parameters: the block parameters by name.
        strata: rows of each stratum; together they are all rows.
        totals: per stream; what the micro-batch contributes is added to them.
    """
    names, leaves = list(parameters), list(parameters.values())
    pairs = PAIRS[len(cotangents)]
    dtype = wide_dtype(logp.device)
    response = torch.zeros(len(pairs), logp.shape[0], len(names), dtype=dtype, device=logp.device)
    stratum = torch.zeros(len(pairs), len(strata), len(names), dtype=dtype, device=logp.device)
    for q, rows in enumerate(strata):
        sums: list[dict[int, Tensor]] = [{} for _ in cotangents]
        for i in rows:
            contributions = []
            for cotangent in cotangents:
                only = torch.zeros_like(cotangent)
                only[i] = cotangent[i]
                contributions.append(
                    torch.autograd.grad(logp, leaves, grad_outputs=only, retain_graph=True, allow_unused=True)
                )
            for k, leaf in enumerate(leaves):
                parts = [c[k] for c in contributions]
                for pair, (a, b) in enumerate(pairs):
                    one, other = parts[a], parts[b]
                    if one is not None and other is not None:
                        response[pair, i, k] = inner(one, other)
                for stream, part in enumerate(parts):
                    if part is not None:
                        wide = part.to(total_dtype(leaf))
                        sums[stream][k] = sums[stream][k] + wide if k in sums[stream] else wide.clone()
        for k, name in enumerate(names):
            for pair, (a, b) in enumerate(pairs):
                if k in sums[a] and k in sums[b]:
                    stratum[pair, q, k] = inner(sums[a][k], sums[b][k])
            for stream, total in enumerate(totals):
                if k in sums[stream]:
                    add_total(total, name, sums[stream][k])
    return Pulled(response, stratum)


def add_total(total: Total, name: str, part: Tensor) -> None:
    """Adds `part` to a total in place; where there is none yet, `part` becomes the total."""
    total[name] = total[name].add_(part) if name in total else part


def backward_others(logp: Tensor, cotangents: Sequence[Tensor], others: Sequence[nn.Parameter]) -> None:
    """Add the summed stream's gradient of the parameters outside the blocks to their .grad; frees the graph."""
    summed = sum(cotangents[1:], start=cotangents[0])
    others = [p for p in others if p.requires_grad]
    if not others:
        return
    for parameter, gradient in zip(
        others, torch.autograd.grad(logp, others, grad_outputs=summed, allow_unused=True), strict=True
    ):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
