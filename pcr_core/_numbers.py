"""Options that are numbers: what cannot be meant is refused by name, and comes out as NaN where nobody may look."""

from __future__ import annotations

import math
import numbers
from typing import Any

import array_api_compat

from pcr_core._namespace import is_traced, widest_float


def is_number(value: Any) -> bool:
    """Whether it is a real number of Python or NumPy; a boolean is none, and text neither."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def require_finite(name: str, value: Any, low: float = 0.0, *, strict: bool = False) -> Any:
    """A float, or a () array: finite, and at least `low` - above it if `strict`.

    An array holds one number, of any shape. Its value is looked at unless it is traced, and is NaN then where it is
    out of bounds.

    Raises:
        TypeError: no number.
        ValueError: out of bounds, or an array of several numbers.
    """
    expected = f"{name}: expected a finite number {'>' if strict else '>='} {low:g}, got "
    if is_number(value):
        x = float(value)
        if not (math.isfinite(x) and (x > low if strict else x >= low)):
            raise ValueError(f"{expected}{value!r}")
        return x
    if not array_api_compat.is_array_api_obj(value):
        raise TypeError(f"{expected}{value!r}")
    if array_api_compat.size(value) != 1:
        raise ValueError(f"{expected}an array of shape {tuple(value.shape)}")
    if array_api_compat.is_numpy_array(value):  # never traced, and a scalar of its own dtype would widen float32
        number = value.reshape(()).item()
        return require_finite(name, str(number) if isinstance(number, bool) else number, low, strict=strict)
    xp = array_api_compat.array_namespace(value)
    if not xp.isdtype(value.dtype, ("integral", "real floating")):
        raise TypeError(f"{expected}{value.dtype}")
    x = xp.reshape(value, ())
    if xp.isdtype(x.dtype, "integral"):
        x = xp.astype(x, widest_float(xp, x))
    good = xp.isfinite(x) & (x > low if strict else x >= low)
    if not is_traced(good) and not bool(good):
        raise ValueError(f"{expected}{float(x)!r}")
    return xp.where(good, x, xp.full_like(x, math.nan))
