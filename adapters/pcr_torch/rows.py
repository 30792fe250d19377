"""Rows (tokens) in which the streams' gradients are one vector times two numbers, where one product serves both.

A token's log-probability depends on what enters the head at that token alone, and so on down to the last attention.
Above it, then, each row of the second stream's gradient is the first's, times the quotient of the token's two
cotangents. That is not taken for granted but seen in every row: where the second is a multiple of the first up to
rounding, its gradient at the layer's input is that multiple too, and no product with the weight is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pcr_torch.products import matrix_gradient

_PART = 1 << 18  # elements that stay in a core's cache
_SMALL = 1e-24
_SAFE = (1e-12, 1e18)  # norms whose squares float32 holds


@dataclass(frozen=True)
class Multiples:
    """Of a layer's output gradients `first` and `second`, row by row over all leading dimensions.

    Attributes:
        first: (..., out) of the stream that came before.
        second: (..., out).
        factor: (rows,) at least float32; second = factor * first where alike.
        alike: (rows,) whether that holds up to rounding; never where something is not finite.
        missing: number of rows that are not.
    """

    first: Tensor
    second: Tensor
    factor: Tensor
    alike: Tensor
    missing: int

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Multiples:
        factor, alike = row_factors(first, second)
        return cls(first, second, factor, alike, int((~alike).sum()))

    def input_gradient(self, back: Callable[[Tensor], Tensor], carried: Tensor) -> Tensor:
        """Of the second stream, at the layer's input.

        Args:
            back: dy -> dx for rows (k, out) -> (k, in), or any leading dimensions.
            carried: dx of the first stream.
        """
        if self.missing > len(self.alike) // 2:
            return back(self.second)
        dx = (carried.reshape(-1, carried.shape[-1]) * self.factor[:, None]).to(carried.dtype)
        if self.missing:
            rows = (~self.alike).nonzero().squeeze(-1)
            dx[rows] = back(self._second(rows))
        return dx.view(carried.shape)

    def weight_gradient(self, x: Tensor, *, transposed: bool) -> Tensor:
        """Of both streams together, for the layer's input x (..., in); no sum of the two gradients is formed."""
        x = x.reshape(-1, x.shape[-1])
        if self.missing > len(self.alike) // 2:
            return matrix_gradient(x, self.first + self.second, transposed=transposed)
        both = torch.where(self.alike, 1 + self.factor, torch.ones_like(self.factor))[:, None]
        gradient = matrix_gradient((x * both).to(x.dtype), self.first, transposed=transposed)
        if self.missing:
            rows = (~self.alike).nonzero().squeeze(-1)
            left, right = (x[rows], self._second(rows)) if transposed else (self._second(rows), x[rows])
            gradient.addmm_(left.T, right)
        return gradient

    def _second(self, rows: Tensor) -> Tensor:
        return self.second.reshape(-1, self.second.shape[-1])[rows]


def row_factors(p: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(rows,) numbers c and whether s = c p there up to rounding; never where something is not finite."""
    p, s = p.reshape(-1, p.shape[-1]), s.reshape(-1, s.shape[-1])
    tolerance = torch.finfo(s.dtype).eps * (2 if s.dtype in (torch.float16, torch.bfloat16) else 16)
    step = max(1, _PART // p.shape[1]) if p.device.type == "cpu" else len(p)
    wide = torch.promote_types(p.dtype, torch.float32)
    scratch = torch.empty(min(step, len(p)), p.shape[1], dtype=wide, device=p.device)
    found = [
        _factors(a.to(wide), b.to(wide), tolerance, scratch[: len(a)])
        for a, b in zip(torch.split(p, step), torch.split(s, step))
    ]
    factor, alike, unsure = (torch.cat(parts) for parts in zip(*found, strict=True))
    rows = unsure.nonzero().squeeze(-1)
    if len(rows):
        factor[rows], alike[rows] = _scaled_factors(p[rows].to(wide), s[rows].to(wide), tolerance)
    return factor, alike


def _factors(p: Tensor, s: Tensor, tolerance: float, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors, whether they hold, and rows whose squares float32 may not hold, of which nothing is said."""
    # both sums in one order: where one element outweighs all others a norm loses digits that the product keeps
    squares = torch.mul(p, p, out=scratch).sum(dim=1)
    factor = torch.mul(p, s, out=scratch).sum(dim=1) / squares
    p_norm, s_norm = squares.sqrt(), torch.linalg.vector_norm(s, dim=1)
    rest = torch.linalg.vector_norm(torch.addcmul(s, factor[:, None], p, value=-1, out=scratch), dim=1)
    sure = (p_norm > _SAFE[0]) & (p_norm < _SAFE[1]) & (s_norm > _SAFE[0]) & (s_norm < _SAFE[1])
    return factor, sure & (rest <= tolerance * s_norm), ~sure


def _scaled_factors(p: Tensor, s: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    p, p_scale = _unit(p)
    s, s_scale = _unit(s)
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
