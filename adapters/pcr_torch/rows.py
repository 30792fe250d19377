"""Rows (tokens) in which the streams' gradients are one vector times two numbers, where one product serves both.

A token's log-probability depends on what enters the head at that token alone, and so on down to the last attention.
Above it, then, each row of the second stream's gradient is the first's, times the quotient of the token's two
cotangents. That is not taken for granted but seen in every row: where the second is a multiple of the first up to
rounding, its gradient at the layer's input is that multiple too, and no product with the weight is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_PART = 1 << 18  # elements that stay in a core's cache
_SMALL = 1e-24


def input_gradient(dy: Tensor, back: Callable[[Tensor], Tensor], first: tuple[Tensor, Tensor] | None) -> Tensor:
    """Gradient at a linear layer's input.

    Args:
        dy: (..., out) gradient of the output.
        back: dy -> dx for rows (k, out) -> (k, in), or any leading dimensions.
        first: dy and dx of the stream that came before, if kept.
    """
    if first is None:
        return back(dy)
    before, carried = first
    factor, alike = row_factors(before, dy)
    missing = int((~alike).sum())
    if missing > len(alike) // 2:
        return back(dy)
    dx = (carried.reshape(-1, carried.shape[-1]) * factor[:, None]).to(carried.dtype)
    if missing:
        rows = (~alike).nonzero().squeeze(-1)
        dx[rows] = back(dy.reshape(-1, dy.shape[-1])[rows])
    return dx.view(carried.shape)


def row_factors(p: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(rows,) numbers c and whether s = c p there up to rounding; never where something is not finite."""
    p, s = p.reshape(-1, p.shape[-1]), s.reshape(-1, s.shape[-1])
    tolerance = torch.finfo(s.dtype).eps * (2 if s.dtype in (torch.float16, torch.bfloat16) else 16)
    step = max(1, _PART // p.shape[1]) if p.device.type == "cpu" else len(p)
    found = [_factors(a, b, tolerance) for a, b in zip(torch.split(p, step), torch.split(s, step))]
    return torch.cat([factor for factor, _ in found]), torch.cat([alike for _, alike in found])


def _factors(p: Tensor, s: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(p.dtype, torch.float32)
    p, p_scale = _unit(p.to(wide))
    s, s_scale = _unit(s.to(wide))
    cosine = (p * s).sum(dim=1, keepdim=True) / (p * p).sum(dim=1, keepdim=True).clamp_min(1)
    rest = torch.addcmul(s, cosine, p, value=-1)
    alike = torch.linalg.vector_norm(rest, dim=1) <= tolerance * torch.linalg.vector_norm(s, dim=1)
    factor = (cosine * (s_scale / p_scale)).squeeze(1)
    # what the first stream carried down has all its digits, and the second's will have them
    whole = (p_scale.squeeze(1) > _SMALL) & (factor.abs() > _SMALL) | (cosine.squeeze(1) == 0)
    return factor, alike & whole & torch.isfinite(factor)


def _unit(t: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over their largest element, and that; of float32 the squares could vanish."""
    largest = t.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return t / scale, scale
