"""Complementary error function: the library's own where it has one, else series and continued fraction.

`torch.special.erfc`, `jax.scipy.special.erfc` and `scipy.special.erfc` are used when the array is theirs. The fallback
is plain array-API arithmetic, accurate to 1e-14 relative below 3 and to 1e-13 until the result underflows.
"""

from __future__ import annotations

import math
from typing import Any

import array_api_compat

_SWITCH = 1.3
_SERIES_TERMS = 40
_FRACTION_TERMS = 120


def erfc(xp: Any, x: Any) -> Any:
    if array_api_compat.is_torch_array(x):
        import torch

        return torch.special.erfc(x)
    if array_api_compat.is_jax_array(x):
        from jax.scipy.special import erfc as jax_erfc

        return jax_erfc(x)
    if array_api_compat.is_numpy_array(x):
        try:
            from scipy.special import erfc as scipy_erfc
        except ImportError:
            return erfc_fallback(xp, x)
        return scipy_erfc(x)
    return erfc_fallback(xp, x)


def erfc_fallback(xp: Any, x: Any) -> Any:
    """erfc by Kummer's series for erf below `_SWITCH` and Laplace's continued fraction above (A&S 7.1.6, 7.1.14)."""
    size = xp.abs(x)
    near = size < _SWITCH
    small = xp.where(near, size, xp.zeros_like(size))
    term = small
    total = small
    for k in range(1, _SERIES_TERMS):
        term = term * (2 * small * small / (2 * k + 1))
        total = total + term
    series = 1 - 2 / math.sqrt(math.pi) * xp.exp(-small * small) * total

    large = xp.where(near, xp.full_like(size, _SWITCH), size)
    tail = large
    for k in range(_FRACTION_TERMS, 0, -1):
        tail = large + (k / 2) / tail
    fraction = xp.exp(-large * large) / (math.sqrt(math.pi) * tail)
    upper = xp.where(near, series, fraction)
    result = xp.where(x < 0, 2 - upper, upper)
    return xp.where(xp.isnan(x), x, result)
