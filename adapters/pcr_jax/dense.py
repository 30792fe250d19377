"""A matrix product by name; kept for one version, since `pullback` now measures any product as it is written."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from pcr_jax.checks import check_width


def dense(x: Array, kernel: Array, *, dtype: Any = None) -> Array:
    """x @ kernel. Nothing needs it any more: write the product as you like.

    Args:
        x: (..., in) floating.
        kernel: (in, out).
        dtype: to compute in, such as jnp.bfloat16; the common dtype of both by default.

    Returns:
        (..., out).

    Raises:
        ValueError: the kernel is no matrix, or does not fit x.

    Example:
        >>> dense(jnp.ones((2, 7, 3)), jnp.ones((3, 5))).shape
        (2, 7, 5)
    """
    if kernel.ndim != 2 or x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(f"kernel: expected shape ({x.shape[-1] if x.ndim else '?'}, out), got {tuple(kernel.shape)}")
    check_width(x, "x")
    check_width(kernel, "kernel")
    compute = jnp.result_type(x, kernel) if dtype is None else dtype
    return x.astype(compute) @ kernel.astype(compute)
