"""The noise of all responses of a microbatch measured in its two pullbacks, without one pullback for each response.

The model is traced for one response and vmapped, so that the axis of responses is vmap's, whatever the model does with
the rows of a batch. Kernels are tapped (`taps.py`). Parameters that are small and used in any other way, such as biases
and the weights of norms, are handed to the vmapped model once for each response, so that their gradients lie apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from pcr_jax.blocks import Blocks
from pcr_jax.kernel_products import kernel_products
from pcr_jax.kernel_view import Tap
from pcr_jax.products import at_least_float32, in_one_piece, three_of_rows
from pcr_jax.pullback import LogpFn
from pcr_jax.records import register
from pcr_jax.sharding import Axes, Layout
from pcr_jax.taps import Key, Probe, evaluate, find, zeros

_SMALL = 1 << 16  # numbers of a parameter that is handed out once for each response


@dataclass(frozen=True)
class Extras:
    """Probes by tap, and copies of leaves by leaf, each with a leading axis of responses."""

    probes: Mapping[Key, Probe]
    copies: Mapping[int, Array]


register(Extras)


@dataclass(frozen=True)
class Measured:
    """A model traced for one response, and how the parameters of the blocks are measured in it.

    Attributes:
        closed: the jaxpr of (leaves of the parameters, leaves of one row) -> (1, T).
        taps: the products with kernels.
        copied: the leaves that are handed out once for each response.
        blocks: what is measured.
    """

    closed: Any
    taps: Mapping[Key, Tap]
    copied: tuple[int, ...]
    blocks: Blocks

    def taps_of(self, leaf: int) -> list[Key]:
        return sorted(key for key, tap in self.taps.items() if tap.kernel.leaf == leaf)

    def extras(self, leaves: Sequence[Array], responses: int) -> Extras:
        """What `logp` takes besides the leaves; the gradients of these are what the products are made of."""
        probes = {key: zeros(tap, responses) for key, tap in self.taps.items()}
        return Extras(probes, {k: jnp.broadcast_to(leaves[k], (responses, *leaves[k].shape)) for k in self.copied})

    def logp(self, leaves: Sequence[Array], extras: Extras, rows: Any) -> Array:
        """(responses, T)."""

        def one(probes: Mapping[Key, Probe], copies: Mapping[int, Array], row: Any) -> Array:
            held = [copies.get(k, leaf) for k, leaf in enumerate(leaves)]
            flat = [x[None] for x in jax.tree.leaves(row)]
            (logp,) = evaluate(self.closed, [*held, *flat], self.taps, probes)
            result: Array = logp[0]
            return result

        result: Array = jax.vmap(one)(extras.probes, extras.copies, rows)
        return result

    def products(
        self, leaf: int, joint: Extras, smaller: Extras, group_size: int, layout: Layout | None, axes: Axes
    ) -> tuple[tuple[Array, Array], Array, Array]:
        """Totals of a leaf's gradient of the larger and the smaller stream, and the products of its parts.

        Args:
            joint, smaller: the gradients of `extras`, of both streams together and of the smaller one.

        Returns:
            The totals in the leaf's shape, (layers, terms, n, 3) and (layers, terms, n / group_size, 3): the layers of
            a stack, else one, and terms of a sum, one for each part of a leaf that is split over `axes`, else one.
        """
        if leaf in self.copied:
            copies = joint.copies[leaf], smaller.copies[leaf]
            return _products_of_copies(*copies, group_size, self.blocks.stack_axes[leaf], layout, axes)
        keys = self.taps_of(leaf)
        tap = self.taps[keys[0]]
        # of a kernel that is used several times, the products' inputs follow each other like tokens
        x, one, other = (
            jnp.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]
            for parts in zip(*(self._matrices(key, joint, smaller) for key in keys), strict=True)
        )
        split = (None, None) if layout is None or not axes else tap.split(layout.spec(leaf, axes))
        totals, *products = _products_of_shards(leaf, (x, one, other), group_size, layout, axes, split)
        layers = len(self.blocks.of_layers(leaf))
        # a stack's layers come first among the pieces; the others, of further scans and experts, are summed
        response, stratum = (jnp.moveaxis(_merged(t, layers), 1, 0) for t in products)
        return (tap.gradient(totals[0]), tap.gradient(totals[1])), response, stratum

    def _matrices(self, key: Key, joint: Extras, smaller: Extras) -> tuple[Array, Array, Array]:
        """The input, and the larger and the smaller stream's gradient of the output."""
        (x, both), (_, small) = joint.probes[key], smaller.probes[key]
        inputs, large = self.taps[key].matrices(x, both - small)
        return inputs, large, self.taps[key].matrices(x, small)[1]


def measure(
    logp_fn: LogpFn, params: Any, grouped: Any, blocks: Blocks, layout: Layout | None
) -> tuple[Measured | None, str]:
    """How the blocks of a model can be measured; None, and the reason, where only the loop can."""
    leaves, structure = jax.tree.flatten(params)
    whole = leaves if layout is None else jax.eval_shape(layout.gather, leaves)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in whole]
    rows, batch = jax.tree.flatten(grouped)
    row = [jax.ShapeDtypeStruct((1, *x.shape[2:]), x.dtype) for x in rows]
    closed = jax.make_jaxpr(
        lambda leaves, row: logp_fn(jax.tree.unflatten(structure, leaves), jax.tree.unflatten(batch, row))
    )(shapes, row)
    found = find(closed, blocks.leaves)
    copied = []
    for k, axis in enumerate(blocks.stack_axes):
        if axis is not None and not all(tap.kernel.slices_along(axis) for tap in found.of(k).values()):
            found.faults.setdefault(k, f"is a stack of layers along axis {axis}, which the model does not scan along")
    for k in blocks.leaves:
        if k not in found.faults:
            continue
        if math.prod(shapes[k].shape) > _SMALL:
            return None, f"{blocks.paths[k]} {found.faults[k]}"
        copied.append(k)
    taps = {key: tap for key, tap in found.taps.items() if tap.kernel.leaf not in copied}
    return Measured(closed, taps, tuple(copied), blocks), ""


def _products_of_copies(
    joint: Array, smaller: Array, group_size: int, axis: int | None, layout: Layout | None, axes: Axes
) -> tuple[tuple[Array, Array], Array, Array]:
    small = at_least_float32(smaller)
    large = at_least_float32(joint) - small
    groups = tuple(t.reshape(-1, group_size, *t.shape[1:]).sum(1) for t in (large, small))
    products = []
    for streams in ((large, small), groups):  # (layers, rows, ...) of each
        layers = (t[None] if axis is None else jnp.moveaxis(t, 1 + axis, 0) for t in streams)
        products.append(three_of_rows(*layers, leading=2))
    terms = 1 if layout is None else math.prod(layout.mesh.shape[axis] for axis in axes)
    response, stratum = (jnp.pad(t[:, None], ((0, 0), (0, terms - 1), (0, 0), (0, 0))) for t in products)
    return (groups[0].sum(0), groups[1].sum(0)), response, stratum


def _merged(products: Array, layers: int) -> Array:
    """(terms, pieces, rows, 3) -> (terms, layers, rows, 3)"""
    terms, _, *rest = products.shape
    return products.reshape(terms, layers, -1, *rest).sum(2)


def _products_of_shards(
    leaf: int,
    operands: tuple[Array, Array, Array],
    group_size: int,
    layout: Layout | None,
    axes: Axes,
    split: tuple[Any, Any],
) -> Any:
    """`kernel_products` of a kernel that may be split over mesh axes: the products as (shards, ...) terms of a sum."""
    if layout is None or not axes:
        x, dp, ds = operands
        totals, *products = kernel_products(x, dp, ds, group_size, whole=in_one_piece(layout))
        return totals, *(t[None] for t in products)
    rows, columns = split
    inputs, outputs = PartitionSpec(None, None, None, rows), PartitionSpec(None, None, None, columns)

    def part(x: Array, dp: Array, ds: Array) -> Any:
        totals, *products = kernel_products(x, dp, ds, group_size, whole=True)
        return totals, *(layout.once(leaf, t, axes)[None] for t in products)

    results = (PartitionSpec(None, rows, columns),) * 2, PartitionSpec(axes), PartitionSpec(axes)
    return layout.by_part(part, axes, (inputs, outputs, outputs), results)(*operands)
