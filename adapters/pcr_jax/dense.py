"""A dense layer whose input and output gradient can be had from an ordinary pullback.

`dense(x, kernel)` is `x @ kernel`. While `taps` are open it gets a third argument, a probe that has no part in the
result and whose "cotangent" is not a derivative but a carrier: the pair (x, dy). With dy of both streams the response's
gradients G_i = x_i^T dy_i are formed once each, which is the work of the weight's gradient anyway, and all three inner
products are taken of them as they are.

Why the probe does not carry |G_i|^2 itself: p_i.s_i needs both streams, and a pullback sees one. Polarisation,
2 t p.s = |p + t s|^2 - |p|^2 - t^2 |s|^2, costs a third pullback, and with t = 1 its error is 1e-7 (|p|/|s| + |s|/|p|)
of |p||s|; plasticity is often a hundred times the larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pcr_jax.checks import check_width
from pcr_jax.records import register


@dataclass(frozen=True)
class Probe:
    """`x` (responses, ..., in) of a dense layer and `dy` (responses, ..., out): zeros go in, the pair comes back."""

    x: Array
    dy: Array


register(Probe)


@dataclass
class Taps:
    """Which kernels are watched, by the identity of their arrays, and what was seen of them while tracing."""

    leaf_of: Mapping[int, int]
    probes: Mapping[int, Probe] | None
    seen: dict[int, list[Probe]] = field(default_factory=dict)


_OPEN: ContextVar[Taps | None] = ContextVar("pcr_jax_taps", default=None)


def dense(x: Array, kernel: Array, *, dtype: Any = None) -> Array:
    """x @ kernel, which `pullback(..., norms="fast")` can measure; use it in place of the product in any model.

    Args:
        x: (responses, ..., in) floating.
        kernel: (in, out), the parameter itself: not a cast, transposed or sliced copy of it.
        dtype: to compute in, such as jnp.bfloat16; the common dtype of both by default.

    Returns:
        (responses, ..., out).

    Raises:
        ValueError: the kernel is no matrix, or does not fit x.

    Example:
        An nnx layer:

        >>> from flax import nnx
        >>> class Linear(nnx.Linear):
        ...     def __call__(self, x):
        ...         return dense(x, self.kernel.get_value()) + self.bias.get_value()
        >>> Linear(3, 5, rngs=nnx.Rngs(0))(jnp.ones((2, 7, 3))).shape
        (2, 7, 5)
    """
    if kernel.ndim != 2 or x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(f"kernel: expected shape ({x.shape[-1] if x.ndim else '?'}, out), got {tuple(kernel.shape)}")
    check_width(x, "x")
    check_width(kernel, "kernel")
    taps = _OPEN.get()
    leaf = None if taps is None else taps.leaf_of.get(id(kernel))
    compute = jnp.result_type(x, kernel) if dtype is None else dtype
    x, kernel = x.astype(compute), kernel.astype(compute)
    if taps is None or leaf is None:
        return x @ kernel
    y = jax.eval_shape(jnp.matmul, x, kernel)
    taps.seen.setdefault(leaf, []).append(Probe(jax.ShapeDtypeStruct(x.shape, x.dtype), y))
    if taps.probes is None:
        return x @ kernel
    return _tapped(x, kernel, taps.probes[leaf])


@contextmanager
def open_taps(leaf_of: Mapping[int, int], probes: Mapping[int, Probe] | None = None) -> Iterator[Taps]:
    """Inside, `dense` notes the shapes of each watched kernel, and with `probes` taps them."""
    taps = Taps(leaf_of, probes)
    token = _OPEN.set(taps)
    try:
        yield taps
    finally:
        _OPEN.reset(token)


def _product(x: Array, kernel: Array, probe: Probe) -> Array:
    return x @ kernel


def _forward(x: Array, kernel: Array, probe: Probe) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array, Probe]:
    x, kernel = kept
    rows, outputs = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # the kernel's own gradient is not used by the fast path, and then the compiler drops it
    return dy @ kernel.T, rows.T @ outputs, Probe(x, dy)


_tapped = jax.custom_vjp(_product)
_tapped.defvjp(_forward, _backward)
