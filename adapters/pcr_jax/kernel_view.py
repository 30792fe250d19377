"""A kernel as a matrix product sees it, and the way back to the parameter that it was made of.

A parameter may be cast, transposed or reshaped before it is multiplied, and a scan over layers hands on one slice of it
at a time. All of these keep every number of it, so the inner products of gradients may be taken of matrices (in, out),
one for each slice; only totals have to be brought into the parameter's own layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

#: Operations that keep every number of their first operand, in some layout and dtype.
VIEWS = frozenset(
    {"broadcast_in_dim", "convert_element_type", "copy", "copy_p", "expand_dims", "reshape", "sharding_constraint"}
    | {"squeeze", "transpose"}
)
_SAME_LAYOUT = frozenset({"convert_element_type", "copy", "copy_p", "sharding_constraint"})
_SLICE = "slice of a scan"


@dataclass(frozen=True)
class View:
    """A value of the traced program that holds the numbers of one parameter.

    Attributes:
        leaf: the parameter.
        steps: the equations of `VIEWS` that lead from it to the value, with a mark where a scan takes a slice.
        scans: (length, whether it slices the parameter) of each scan around the value, the outermost first.
    """

    leaf: int
    steps: tuple[Any, ...] = ()
    scans: tuple[tuple[int, bool], ...] = ()

    def through(self, equation: Any) -> View:
        return replace(self, steps=(*self.steps, equation))

    def inside_scan(self, length: int, *, sliced: bool) -> View:
        steps = (*self.steps, _SLICE) if sliced else self.steps
        return replace(self, steps=steps, scans=(*self.scans, (length, sliced)))

    @property
    def layout(self) -> tuple[Any, ...]:
        """Equal for views that place the parameter's numbers alike."""
        moves = [s if s == _SLICE else str(s.params) for s in self.steps if s == _SLICE or _moves(s)]
        return *moves, *(length for length, sliced in self.scans if sliced)

    def slices_along(self, axis: int) -> bool:
        """Whether the outermost scan that slices the parameter does so along this axis of it."""
        at: int | None = axis
        for step in self.steps:
            if step == _SLICE:
                return at == 0
            at = None if at is None else _axis_after(step, at)
        return False

    def axis_of(self, axis: int) -> int | None:
        """Where an axis of the parameter is in the value; None where it is sliced, or merged behind another."""
        at: int | None = axis
        for step in self.steps:
            if at is not None:
                at = (at - 1 if at else None) if step == _SLICE else _axis_after(step, at, merged=True)
        return at

    def undo(self, gradient: Array) -> Array:
        """(slices of each scan, ...value) -> the parameter's shape."""
        depth = sum(step == _SLICE for step in self.steps)
        for step in reversed(self.steps):
            if step == _SLICE:
                depth -= 1
            elif _moves(step):
                gradient = _vmapped(_transposed(step), depth)(gradient)
        return gradient


@dataclass(frozen=True)
class Tap:
    """A matrix product of an input and a kernel; for one response.

    Attributes:
        kernel: the kernel as the product sees it.
        kernel_shape: its shape there.
        inputs, outputs: shapes and dtypes of the other operand and of the product, without the axes of scans.
        contracted, batched: (axes of the input, axes of the kernel) of the product, see `jax.lax.dot_general`.
        right: whether the kernel is the right operand.
    """

    kernel: View
    kernel_shape: tuple[int, ...]
    inputs: jax.ShapeDtypeStruct
    outputs: jax.ShapeDtypeStruct
    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batched: tuple[tuple[int, ...], tuple[int, ...]]
    right: bool

    @property
    def layout(self) -> tuple[Any, ...]:
        """Equal for taps of one parameter whose matrices can be put side by side."""
        return self.kernel.layout, self.kernel_shape, self._order

    @property
    def probe(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of (input, output), with an axis for each scan."""
        scans = tuple(length for length, _ in self.kernel.scans)
        x, y = (jax.ShapeDtypeStruct((*scans, *t.shape), t.dtype) for t in (self.inputs, self.outputs))
        return x, y

    @property
    def pieces(self) -> tuple[int, ...]:
        """Lengths of what numbers the matrices: slices of scans, then batch axes of the product (experts)."""
        sliced = [length for length, is_slice in self.kernel.scans if is_slice]
        return *sliced, *(self.kernel_shape[axis] for axis in self.batched[1])

    def matrices(self, x: Array, dy: Array) -> tuple[Array, Array]:
        """(n, *probe) of the input and the output's gradient -> (pieces, n, tokens, in), (pieces, n, tokens, out)."""
        batch = len(self.batched[0])
        tokens = [a for a in range(self.inputs.ndim) if a not in (*self.batched[0], *self.contracted[0])]
        # the order of the kernel's own axes, so that both matrices fit it
        into = [self.contracted[0][self.contracted[1].index(a)] for a in sorted(self.contracted[1])]
        others = self.outputs.ndim - batch - len(tokens)
        first = batch if self.right else batch + others
        free = [*range(first, first + len(tokens))]
        outs = [a for a in range(batch, self.outputs.ndim) if a not in free]
        return self._matrix(x, list(self.batched[0]), tokens, into), self._matrix(dy, [*range(batch)], free, outs)

    def gradient(self, matrices: Array) -> Array:
        """(pieces, in, out) -> the parameter's shape."""
        slices = sum(is_slice for _, is_slice in self.kernel.scans)
        order = self._order
        shape = *self.pieces[:slices], *(self.kernel_shape[a] for a in order)
        back = (*range(slices), *(slices + order.index(a) for a in range(len(order))))
        return self.kernel.undo(jnp.transpose(matrices.reshape(shape), back))

    def split(self, spec: Sequence[Any]) -> tuple[Any, Any]:
        """Mesh axes that (in, out) of the matrices are split over, by the parameter's `PartitionSpec`."""
        places = {self.kernel.axis_of(axis): entry for axis, entry in enumerate(spec) if entry is not None}
        inner = sorted(self.contracted[1])
        outer = [a for a in self._order[len(self.batched[1]) :] if a not in inner]
        # of several axes that become one, only the first may be split: the parts would not follow each other
        rows, columns = (places.get(axes[0]) if axes else None for axes in (inner, outer))
        return rows, columns

    @property
    def _order(self) -> tuple[int, ...]:
        """Axes of the kernel as (batch, in, out)."""
        inner = sorted(self.contracted[1])
        outer = [a for a in range(len(self.kernel_shape)) if a not in (*inner, *self.batched[1])]
        return *self.batched[1], *inner, *outer

    def _matrix(self, t: Array, batch: list[int], tokens: list[int], features: list[int]) -> Array:
        scans = self.kernel.scans
        sliced = [1 + k for k, (_, is_slice) in enumerate(scans) if is_slice]
        turns = [1 + k for k, (_, is_slice) in enumerate(scans) if not is_slice]
        batch, tokens, features = ([1 + len(scans) + a for a in axes] for axes in (batch, tokens, features))
        t = jnp.transpose(t, (*sliced, *batch, 0, *turns, *tokens, *features))
        lead, rest = len(sliced) + len(batch), t.ndim - len(features)
        shape = t.shape
        return t.reshape(
            math.prod(shape[:lead]), shape[lead], math.prod(shape[lead + 1 : rest]), math.prod(shape[rest:])
        )


def keeps_all(equation: Any) -> bool:
    """Whether an equation of `VIEWS` has the numbers of its operand once each."""
    return bool(equation.outvars[0].aval.size == equation.invars[0].aval.size)


def _moves(step: Any) -> bool:
    return bool(step.primitive.name not in _SAME_LAYOUT)


def _transposed(step: Any) -> Callable[[Array], Array]:
    def back(gradient: Array) -> Array:
        given = jax.ShapeDtypeStruct(step.invars[0].aval.shape, gradient.dtype)
        (out,) = jax.linear_transpose(lambda x: step.primitive.bind(x, **step.params), given)(gradient)
        result: Array = out
        return result

    return back


def _vmapped(function: Callable[[Array], Array], depth: int) -> Callable[[Array], Array]:
    for _ in range(depth):
        function = jax.vmap(function)
    return function


def _axis_after(step: Any, axis: int, *, merged: bool = False) -> int | None:
    """Where an axis lies after a view, if it is there as it was, or as the first of those that are `merged`."""
    before, after = step.invars[0].aval.shape, step.outvars[0].aval.shape
    if step.primitive.name == "transpose":
        return int(step.params["permutation"].index(axis))
    if step.primitive.name == "broadcast_in_dim":
        return int(step.params["broadcast_dimensions"][axis])
    above = math.prod(before[:axis])
    for at in range(len(after)):
        if math.prod(after[:at]) != above:
            continue
        if after[at] == before[axis] or (merged and after[at] % before[axis] == 0 and after[at]):
            return at
    return None
