"""Where parameters and rollouts lie on a mesh, and what a step has to say about it to XLA's partitioner.

Left alone, the partitioner gathers: a scan over groups whose axis is split over devices becomes an all-gather of the
batch, after which every device does all the work, and an inner product of every response is an all-reduce of its own.
So each data shard pulls back its own whole groups in a `shard_map`. Parameters that are split over the data axes too
(FSDP) are gathered for each pass, and gradients reduce-scattered after it. Other axes (tensor parallelism) are left to
the partitioner, but for the products of gradients: every shard takes those of its own part, and one sum of a few
numbers adds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pcr_jax.blocks import path_name

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Of one pytree of parameters and its rollouts; hashable.

    Attributes:
        mesh: all devices.
        data: mesh axes that responses are split over.
        specs: of each leaf, in `jax.tree.leaves` order.
    """

    mesh: Mesh
    data: Axes
    specs: tuple[PartitionSpec, ...]

    @classmethod
    def of(cls, shardings: Any, data_axis: str | Sequence[str]) -> Layout:
        """From a tree like the parameters, of NamedSharding on one mesh.

        Raises:
            TypeError: something else than a NamedSharding.
            ValueError: several meshes, a data axis that the mesh does not have, or a dimension that is split over data
                axes and others together.
        """
        flat = jax.tree_util.tree_flatten_with_path(shardings)[0]
        for path, sharding in flat:
            if not isinstance(sharding, NamedSharding):
                raise TypeError(
                    f"shardings: {path_name(path) or 'the leaf'} is a {type(sharding).__name__}, expected a "
                    "NamedSharding: put the parameters on a mesh (jax.device_put), then call init_state"
                )
            if sharding.mesh != flat[0][1].mesh:
                raise ValueError(f"shardings: {path_name(path)} is on another mesh than {path_name(flat[0][0])}")
        if not flat:
            raise ValueError("shardings: an empty tree")
        mesh = flat[0][1].mesh
        data = (data_axis,) if isinstance(data_axis, str) else tuple(data_axis)
        for axis in data:
            if axis not in mesh.axis_names:
                raise ValueError(
                    f"data_axis: {axis!r} is not one of the mesh's axes {tuple(mesh.axis_names)}; give () where "
                    "rollouts are not split"
                )
        for path, sharding in flat:
            for entry in sharding.spec:
                axes = _axes(entry)
                if 0 < sum(axis in data for axis in axes) < len(axes):
                    raise ValueError(
                        f"shardings: one dimension of {path_name(path)} is split over {axes}, data axes ({data}) and "
                        "others together, which would mix up its parts; split another dimension over the others"
                    )
        return cls(mesh, data, tuple(sharding.spec for _, sharding in flat))

    @property
    def shards(self) -> int:
        """Number of parts that the rollouts are split into."""
        count = 1
        for axis in self.data:
            count *= self.mesh.shape[axis]
        return count

    @property
    def rollouts(self) -> NamedSharding:
        """Of every array with one row a response."""
        return NamedSharding(self.mesh, PartitionSpec(self.data) if self.data else PartitionSpec())

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def split(self, rollouts: Any) -> Any:
        """Rollouts over the data axes, which a mesh of explicit axes wants to be told."""
        explicit = jax.sharding.AxisType.Explicit in self.mesh.axis_types
        return jax.sharding.reshard(rollouts, self.rollouts) if explicit else rollouts

    def axes_of(self, leaf: int, among: Axes) -> Axes:
        """Those of `among` that the leaf is split over."""
        used = [axis for entry in self.specs[leaf] for axis in _axes(entry)]
        return tuple(axis for axis in among if axis in used)

    def model_axes(self, leaves: Sequence[int]) -> Axes:
        """Axes without rollouts that some of these leaves are split over."""
        others = tuple(axis for axis in self.mesh.axis_names if axis not in self.data)
        return tuple(axis for axis in others if any(self.axes_of(leaf, (axis,)) for leaf in leaves))

    def spec(self, leaf: int, axes: Axes) -> PartitionSpec:
        """Of the leaf, with these axes only."""
        return PartitionSpec(*(_only(entry, axes) for entry in self.specs[leaf]))

    def gather(self, leaves: Sequence[Array]) -> list[Array]:
        """Inside `by_shard`: whole leaves of what each data shard holds; its transpose is `scatter`."""
        return [self._along_data(leaf, x, jax.lax.all_gather) for leaf, x in enumerate(leaves)]

    def scatter(self, leaf: int, x: Array) -> Array:
        """Inside `by_shard`: sum a whole gradient over the axes its leaf is split over, and keep this shard's part."""

        def psum_scatter(x: Array, axes: Axes, *, axis: int, tiled: bool) -> Array:
            return jax.lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=tiled)

        return self._along_data(leaf, x, psum_scatter)

    def total(self, leaves: Sequence[Array]) -> list[Array]:
        """Inside `by_shard`: sum over the data axes that `scatter` left."""
        totals = []
        for leaf, x in enumerate(leaves):
            left = tuple(axis for axis in self.data if not self.axes_of(leaf, (axis,)))
            totals.append(jax.lax.psum(x, left) if left else x)
        return totals

    def sum(self, tree: Any) -> Any:
        """Inside `by_shard`: over the data shards, in one collective where XLA combines them."""
        return jax.lax.psum(tree, self.data) if self.data else tree

    def _along_data(self, leaf: int, x: Array, collective: Callable[..., Array]) -> Array:
        dims = [
            (dim, axes)
            for dim, entry in enumerate(self.specs[leaf])
            if (axes := tuple(axis for axis in _axes(entry) if axis in self.data))
        ]

        def along(x: Array) -> Array:
            for dim, axes in dims:
                x = collective(x, axes, axis=dim, tiled=True)
            return x

        # the partitioner gathers what a collective of ours takes over axes that are its own
        others = self.model_axes([leaf])
        if not dims or not others:
            return along(x)
        spec = self.spec(leaf, others)
        result: Array = self.by_part(along, others, spec, spec)(x)
        return result

    def by_shard(self, f: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """`f` on each data shard; other axes stay with the partitioner."""
        if not self.data:
            return f
        mapped: Callable[..., Any] = jax.shard_map(
            f, mesh=self.mesh, in_specs=inputs, out_specs=outputs, axis_names=set(self.data), check_vma=False
        )
        return mapped

    def by_part(self, f: Callable[..., Any], axes: Axes, inputs: Any, outputs: Any) -> Callable[..., Any]:
        """`f` on each part of the parameters along these axes, also within `by_shard`."""
        inside = not jax.sharding.get_abstract_mesh().empty
        mesh = None if inside else self.mesh
        mapped: Callable[..., Any] = jax.shard_map(
            f, mesh=mesh, in_specs=inputs, out_specs=outputs, axis_names=set(axes), check_vma=False
        )
        return mapped

    def placed(self, leaf: int, axis: int, products: Array, layers: int, axes: Axes) -> Array:
        """Inside `by_part`: (layers, ...) of a stack whose layers may themselves be split: zero for those of others."""
        entry = self.specs[leaf][axis] if axis < len(self.specs[leaf]) else None
        split = tuple(a for a in _axes(entry) if a in axes)
        if not split:
            return products
        whole = jnp.zeros((layers, *products.shape[1:]), products.dtype)
        start = jax.lax.axis_index(split) * products.shape[0]
        return jax.lax.dynamic_update_slice_in_dim(whole, products, start, axis=0)

    def once(self, leaf: int, x: Array, axes: Axes) -> Array:
        """Inside `by_part`: x on one of the shards that hold the same part of the leaf, 0 on the others."""
        for axis in axes:
            if not self.axes_of(leaf, (axis,)):
                x = jnp.where(jax.lax.axis_index(axis) == 0, x, jnp.zeros_like(x))
        return x


def without(spec: PartitionSpec, axes: Axes) -> PartitionSpec:
    """The spec of what holds its rows along these axes whole."""
    kept = (tuple(axis for axis in _axes(entry) if axis not in axes) for entry in spec)
    return PartitionSpec(*(entry or None for entry in kept))


def _axes(entry: Any) -> Axes:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _only(entry: Any, axes: Axes) -> Any:
    kept = tuple(axis for axis in _axes(entry) if axis in axes)
    return kept or None
