"""Inner products, and weighted sums in place, of many pairs of totals on an accelerator: a launch for all of a dtype.

Without Triton, and for what its kernels do not take (float64, storage that is not dense), a few operators a pair.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pcr_torch.kernels.choice import FUSED, chosen
from pcr_torch.pullback import wide_dtype

_CHUNK = 1 << 24  # numbers of which copies are held at once


def pair_products(firsts: Sequence[Tensor], seconds: Sequence[Tensor], *, joined: int | None = None) -> Tensor:
    """(pairs, 3) |p|^2, |s|^2 and <p, s>, in one reading, to 1e-7 of |p||s|, in float64 where the device has it.

    Args:
        firsts: p, of any shapes, on one device.
        seconds: s, of the same shapes.
        joined: 0 or 1: the firsts or the seconds hold p + s in place of p or s.

    Example:
        >>> p, s = torch.tensor([3.0, 0.0]), torch.tensor([4.0, 5.0])
        >>> pair_products([p], [s]).tolist()
        [[9.0, 41.0, 12.0]]
    """
    found: dict[int, Tensor] = {}
    for at, fused in _alike(firsts, seconds):
        p, s = ([each[k].detach() for k in at] for each in (firsts, seconds))
        products: Tensor | None = _kernels().pair_products(p, s, joined=joined) if fused else None
        if products is not None and len(at) == len(firsts):
            return products
        for n, k in enumerate(at):
            found[k] = _wide_products(p[n], s[n], joined) if products is None else products[n]
    return torch.stack([found[k] for k in range(len(firsts))])


def combine(
    outs: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    weights: Tensor,
    adds: Sequence[bool],
) -> Tensor:
    """outs = a p + b s, in place; (pairs,) booleans on the device, of those that broke.

    A pair breaks where a number of its update is not finite in the dtype of the output, or where its sum with a finite
    number that was there is not.

    Args:
        outs: where the sums go; may be the firsts or the seconds.
        firsts: p, on one device.
        seconds: s, of the same shapes.
        weights: (2, pairs) a and b on that device.
        adds: whether each is added to what its output holds.

    Example:
        >>> p, s = torch.tensor([3.0, 0.0]), torch.tensor([4.0, 5.0])
        >>> combine([p], [p], [s], torch.tensor([[1.0], [2.0]]), [False]), p
        (tensor([False]), tensor([11., 10.]))
    """
    broken = torch.zeros(len(outs), dtype=torch.bool, device=weights.device)
    for at, fused in _alike(firsts, seconds, outs):
        if fused:
            out, p, s = ([each[k] for k in at] for each in (outs, firsts, seconds))
            mine = weights if len(at) == len(outs) else torch.stack([weights[:, k] for k in at], dim=1)
            found: Tensor = _kernels().combine(out, p, s, mine, [adds[k] for k in at])
            if len(at) == len(outs):
                return found
            for n, k in enumerate(at):
                broken[k] = found[n]
        else:
            for k in at:
                broken[k] = _combine_one(outs[k], firsts[k], seconds[k], weights[0, k], weights[1, k], adds[k])
    return broken


def _alike(*tensors: Sequence[Tensor]) -> Iterator[tuple[list[int], bool]]:
    """Indices of tuples of tensors that one launch can serve, and whether a kernel can."""
    device = tensors[0][0].device
    sets: dict[Hashable, list[int]] = {}
    for k, each in enumerate(zip(*tensors, strict=True)):
        dense = all(t.is_contiguous() and t.dtype in FUSED and t.numel() for t in each)
        sets.setdefault(tuple(t.dtype for t in each) if dense else None, []).append(k)
    for alike, at in sets.items():
        yield at, alike is not None and chosen(device) == "triton"


def _wide_products(p: Tensor, s: Tensor, joined: int | None) -> Tensor:
    wide = wide_dtype(p.device)
    sums = torch.zeros(3, dtype=wide, device=p.device)
    for x, y in zip(torch.split(p.reshape(-1), _CHUNK), torch.split(s.reshape(-1), _CHUNK), strict=True):
        u, v = x.to(wide), y.to(wide)
        u, v = (u - v if joined == 0 else u), (v - u if joined == 1 else v)
        sums += torch.stack([torch.dot(u, u), torch.dot(v, v), torch.dot(u, v)])
    return sums


def _combine_one(out: Tensor, p: Tensor, s: Tensor, a: Tensor, b: Tensor, add: bool) -> Tensor:
    update = (a.to(p.dtype) * p + b.to(s.dtype) * s).to(out.dtype)
    held = update.isfinite()
    if add:
        idle = ~out.isfinite()
        update += out
        held &= update.isfinite() | idle
    out.copy_(update)
    return ~held.all()


def _kernels() -> Any:
    return import_module("pcr_torch.kernels.triton_pairs")
