"""Inner products of two register tiles that stay in float32 whatever the size of their numbers, as float64 scalars.

A sum of float32 squares is lost below 1e-19 and beyond 1e19. Each tile is scaled by the power of two next to its own
largest number, so that nothing has to be known beforehand and nothing is rounded. What is not finite stays so.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two(tile):
    """(float32 factor that brings the largest number of the tile to [1, 4), its inverse in float64), exactly."""
    largest = tl.max(tl.abs(tile))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)  # zeros; what is not finite
    factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((exponent.to(tl.int64) + 896) << 52).to(tl.float64, bitcast=True)
    return factor, inverse


@triton.jit
def square(a):
    """a.a"""
    factor, inverse = power_of_two(a)
    x = a * factor
    return tl.sum(x * x).to(tl.float64) * inverse * inverse


@triton.jit
def three_products(a, b):
    """a.a, b.b and a.b"""
    one, one_inverse = power_of_two(a)
    other, other_inverse = power_of_two(b)
    x = a * one
    y = b * other
    aa = tl.sum(x * x).to(tl.float64) * one_inverse * one_inverse
    bb = tl.sum(y * y).to(tl.float64) * other_inverse * other_inverse
    ab = tl.sum(x * y).to(tl.float64) * one_inverse * other_inverse
    return aa, bb, ab
