"""Two totals in, their inner products or their weighted sum out; without memory of a gradient's size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pcr_core import BlockStatistics, Weights
from pcr_torch import kernels
from pcr_torch.cpu import short_products
from pcr_torch.distributed import like, local
from pcr_torch.pullback import inner, total_dtype, wide_dtype

_NEARLY_ORTHOGONAL = 1e-2
_SAFE = (1e-28, 1e36)  # squares of a gradient that float32 holds without loss
_CHUNK = 1 << 24  # of _wide_products: float64 copies held at once
_CACHED = 1 << 16  # the same on a CPU


def gradient_products(p: Tensor, s: Tensor, *, joined: int | None = None) -> Tensor:
    """(3,) |p|^2, |s|^2 and <p, s> of two gradients, to 1e-6 of each, in float64.

    With `joined` 0 or 1 that tensor, of the two, holds p + s.

    On a CPU sums are float32 within short parts and float64 across them. Where that would lose digits (<p, s> small
    against |p||s|, squares near the ends of float32) they are taken again with products in float64.
    """
    x, y = p.detach().reshape(-1), s.detach().reshape(-1)
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return _wide_products(x, y, joined)
    sums = short_products(x.numpy(), y.numpy(), joined)
    pp, ss, ps = sums.tolist()
    if not (_SAFE[0] < pp < _SAFE[1] and _SAFE[0] < ss < _SAFE[1]):
        return _wide_products(x, y, joined)
    if abs(ps) < _NEARLY_ORTHOGONAL * math.sqrt(pp * ss):
        sums[2] = _wide_products(x, y, joined)[2]
    return sums


def all_products(firsts: Sequence[Tensor], seconds: Sequence[Tensor], *, joined: int | None = None) -> Tensor:
    """(pairs, 3) `gradient_products` of each pair, in float64 on the CPU; waits once for each accelerator."""
    found = torch.zeros(len(firsts), 3, dtype=torch.float64)
    on: dict[torch.device, list[int]] = {}
    for k, p in enumerate(firsts):
        on.setdefault(p.device, []).append(k)
    for device, at in on.items():
        ps, ss = ([each[k] for k in at] for each in (firsts, seconds))
        if kernels.serve(device):
            found[at] = kernels.pair_products(ps, ss, joined=joined).to("cpu", torch.float64)
        else:
            for k, x, y in zip(at, ps, ss, strict=True):
                found[k] = inner(x, x) if x is y else gradient_products(x, y, joined=joined)
    return found


def _wide_products(x: Tensor, y: Tensor, joined: int | None) -> Tensor:
    wide = wide_dtype(x.device)
    size = _CACHED if x.device.type == "cpu" else _CHUNK
    rows = []
    for a, b in zip(torch.split(x, size), torch.split(y, size)):
        u, v = a.to(wide), b.to(wide)
        u, v = (u - v if joined == 0 else u), (v - u if joined == 1 else v)
        rows.append(torch.stack([torch.dot(u, u), torch.dot(v, v), torch.dot(u, v)]))
    return torch.stack(rows).sum(dim=0)


def longest(weights: Weights[Tensor], statistics: BlockStatistics[Tensor]) -> Tensor:
    """(blocks,) a bound on each number of the update and of its parts, whichever way these are put together."""
    a, b = weights.plasticity.abs(), weights.stability.abs()
    return 2 * (a + b) * (statistics.plasticity_sq.sqrt() + statistics.stability_sq.sqrt())


def of_sum(weights: Weights[Tensor], joined: int | None) -> tuple[list[float], list[float]]:
    """Weights of the two totals, one of which may hold P + S: a P + b S = a (P + S) + (b - a) S."""
    a, b = weights.plasticity, weights.stability
    return (a - b if joined == 1 else a).tolist(), (b - a if joined == 0 else b).tolist()


def is_held(parameter: nn.Parameter, bound: float) -> bool:
    """Whether a bound on the numbers added says that the parameter's dtype holds them."""
    return parameter.dtype != torch.float16 and bound < torch.finfo(parameter.dtype).max / 2


def add_combination(
    parameter: nn.Parameter, p: Tensor | None, s: Tensor | None, a: float, b: float, bound: float = math.inf
) -> bool:
    """parameter.grad += a p + b s, in p's memory; of a sharded parameter p and s are this rank's shards.

    Returns whether the parameter's dtype holds what was added, and its sum with a gradient that was there. That is read
    only where a `bound` on the numbers added does not say so.
    """
    if p is None and s is None:
        return True
    update = torch.zeros_like(local(parameter), dtype=total_dtype(parameter)) if p is None else p
    if p is not None and a != 1:
        update.mul_(a)
    if s is not None:
        update.add_(s, alpha=b)
    elif not math.isfinite(b):
        update.add_(b)
    update, before = update.to(parameter.dtype), parameter.grad
    sure = is_held(parameter, bound)
    held = sure or bool(update.isfinite().all())
    update = like(update, parameter)
    parameter.grad = update if before is None else update.add_(before)
    if before is not None and held and not sure:
        held = bool((local(parameter.grad).isfinite() | ~local(before).isfinite()).all())
    return held
