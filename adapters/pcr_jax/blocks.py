"""Which leaves of a pytree of parameters PCR acts on, and how they are grouped into blocks.

JAX models have no common class, so everything goes by the path of a leaf, such as `layers/0/mlp/up/kernel`: the keys,
indices and attributes that lead to it. "mlp" follows the rules of `pcr_core._structure`, as in torch, and also takes a
module named mlp, ffn or feed_forward where no layers can be seen. A layer is a list index (`layers/0`, nnx, equinox and
pure JAX), a numbered name (`block_0` in linen, `h0_mlp` in haiku), or a slice of a stack of all layers in one array
(`layers/...`, nn.scan, MaxText), so that a model has the same blocks whether its layers are a list or a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from pcr_core._listing import candidates, cannot_tell, listing, not_selected
from pcr_core._selection import selects
from pcr_core._structure import Parameter, Part, left_out
from pcr_jax.layers import Layers

Granularity = Literal["tensor", "layer", "global"]
Selector: TypeAlias = str | Callable[[str, Any], bool | str | None]

_VARIABLE = ("value", "raw_value")  # attributes of nnx's variables, which hold the arrays


@dataclass(frozen=True)
class Blocks:
    """Blocks over the leaves of one pytree structure; hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        names: of the blocks, in the order of all arrays "per block": the leaf or layer each is named after.
        layers: index of the layer that each block lies in, None outside layers and for blocks of several.
        sizes: number of coordinates of each block.
        paths: of all leaves of the tree, in `jax.tree.leaves` order.
        of_leaf: index of each leaf's block, None for leaves outside the blocks; of a stack, the index of each layer's.
        stack_axes: the axis that the layers of a stack lie along, None for other leaves.
    """

    names: tuple[str, ...]
    layers: tuple[int | None, ...]
    sizes: tuple[int, ...]
    paths: tuple[str, ...]
    of_leaf: tuple[int | tuple[int, ...] | None, ...]
    stack_axes: tuple[int | None, ...]

    def of_layers(self, leaf: int) -> tuple[int, ...]:
        """Indices of the blocks of a leaf: of each layer of a stack, else one; none outside the blocks."""
        block = self.of_leaf[leaf]
        return block if isinstance(block, tuple) else () if block is None else (block,)

    @property
    def leaves(self) -> tuple[int, ...]:
        """Indices of the leaves that lie in a block."""
        return tuple(k for k, block in enumerate(self.of_leaf) if block is not None)

    @property
    def stacks(self) -> tuple[str | None, ...]:
        """What numbers the layer of each block, such as "encoder/layers"; None where `layers` is None."""
        layers = Layers(self.paths)
        found: list[set[str]] = [set() for _ in self.names]
        for k, path in enumerate(self.paths):
            for block in self.of_layers(k):
                found[block].add(layers.stack(path))
        return tuple(
            min(of) if i is not None and len(of) == 1 else None for i, of in zip(self.layers, found, strict=True)
        )


def select_blocks(params: Any, blocks: Selector = "mlp", granularity: Granularity = "tensor") -> Blocks:
    """Blocks of a pytree's floating leaves (arrays, tracers or `jax.ShapeDtypeStruct`).

    Args:
        params: any pytree: nnx state, linen variables, dicts and lists of arrays.
        blocks: "mlp"; "all"; a regular expression searched for in leaf paths such as "layers/0/up/kernel"; or a
            callable (path, leaf) -> True, False, or the name of the block to put it in.
        granularity: a block per "tensor", "layer" or one "global" block. A callable that returns names overrides it.

    Raises:
        ValueError: nothing matches, `granularity` is not an option, or "mlp" finds layers of numbered matrices
            (`Dense_0`), of which it cannot tell which are attention's.
        TypeError: `blocks` is neither a string nor a callable.

    Example:
        >>> import jax.numpy as jnp
        >>> layer = {"attn": jnp.ones((4, 4)), "up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
        >>> select_blocks({"embed": jnp.ones((9, 4)), "layers": [layer, layer]}).names
        ('layers/0/down', 'layers/0/up', 'layers/1/down', 'layers/1/up')
    """
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity: expected one of {get_args(Granularity)}, got {granularity!r}")
    flat = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]]
    paths = tuple(path for path, _ in flat)
    shapes = [tuple(jnp.shape(leaf)) for _, leaf in flat]
    where = Layers(paths, _floating_shapes([leaf for _, leaf in flat]))
    places = [_place(path, leaf, where) for path, leaf in flat]
    reasons = left_out(places) if blocks == "mlp" else [None] * len(flat)
    if unclear := cannot_tell(places, reasons, "/"):
        raise ValueError(unclear)
    chosen: list[tuple[tuple[int, int, int], str, int | None]] = []  # (order, block, layer)
    stacks: dict[str, int] = {}  # the first leaf of each
    stack_axes: list[int | None] = [None] * len(flat)
    for k, (path, leaf) in enumerate(flat):
        label = selects(blocks, path, leaf, reasons[k] is None)
        if label is False or not is_floating(leaf):
            continue
        axis = where.stack_axis(path)
        if isinstance(label, str) or axis is None or granularity == "global":
            name = label if isinstance(label, str) else _block_name(path, granularity, where)
            chosen.append(((k, 0, k), name, where.of(path)[1]))
            continue
        stack_axes[k] = axis
        first = stacks.setdefault(where.stack(path), k)
        for at in range(shapes[k][axis]):  # in the order of a list of layers
            chosen.append(((first, at, k), _block_name(where.in_list(path, at), granularity, where), at))
    members: dict[str, list[tuple[int, int | None]]] = {}
    for (_, _, k), name, layer in sorted(chosen, key=lambda one: one[0]):
        members.setdefault(name, []).append((k, layer))
    if not members:
        some = ", ".join(paths[:: max(1, len(paths) // 4)][:5]) or "none"
        hint = ""
        if blocks == "mlp":
            hint = candidates(places, reasons, [_family(place) for place in places])
            hint = hint or " 'mlp' needs layers; give a regular expression instead."
        raise ValueError(f"blocks: {blocks!r} matches no floating leaf.{hint} Leaves include: {some}")
    of_leaf: list[list[int]] = [[] for _ in flat]
    for block, parts in enumerate(members.values()):
        for k, _ in parts:
            of_leaf[k].append(block)
    layers = [{layer for _, layer in parts} for parts in members.values()]
    sizes = [sum(flat[k][1].size // len(of_leaf[k]) for k, _ in parts) for parts in members.values()]
    return Blocks(
        names=tuple(members),
        layers=tuple(found.pop() if len(found) == 1 else None for found in layers),
        sizes=tuple(int(size) for size in sizes),
        paths=paths,
        of_leaf=tuple(
            None if not found else found[0] if axis is None else tuple(found)
            for found, axis in zip(of_leaf, stack_axes, strict=True)
        ),
        stack_axes=tuple(stack_axes),
    )


def path_name(path: Any) -> str:
    """A key path of `jax.tree_util` as "layers/0/up/kernel"."""
    in_variable = len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in _VARIABLE
    return str(jax.tree_util.keystr(path[:-1] if in_variable else path, simple=True, separator="/"))


def is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def describe_blocks(params: Any, blocks: Selector = "mlp") -> str:
    """A table of a model's parameters: what is chosen, what is left out and why; a line for each kind.

    It raises nothing where nothing is chosen, so that it shows why.

    Args:
        params: as of `select_blocks`.
        blocks: as of `select_blocks`.

    Example:
        >>> import jax.numpy as jnp
        >>> layer = {"attn": jnp.ones((4, 4)), "up": jnp.ones((4, 8)), "down": jnp.ones((8, 4)), "bias": jnp.ones(4)}
        >>> print(describe_blocks({"embed": jnp.ones((9, 4)), "layers": [layer, layer]}))
        parameters     tensors  shape  blocks
        embed          1        9x4    left out: embedding
        layers/*/attn  2        4x4    left out: attention
        layers/*/bias  2        4      left out: vector
        layers/*/down  2        8x4    chosen
        layers/*/up    2        4x8    chosen
    """
    flat = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]]
    where = Layers([path for path, _ in flat], _floating_shapes([leaf for _, leaf in flat]))
    reasons = left_out([_place(path, leaf, where) for path, leaf in flat])
    rows = []
    for (path, leaf), reason in zip(flat, reasons, strict=True):
        chosen = selects(blocks, path, leaf, reason is None) is not False
        why = "not floating" if not is_floating(leaf) else None if chosen else not_selected(blocks, reason)
        rows.append((path, jnp.shape(leaf), f"left out: {why}" if why else "chosen"))
    return listing(rows)


def _floating_shapes(leaves: Sequence[Any]) -> list[tuple[int, ...] | None]:
    return [tuple(jnp.shape(leaf)) if is_floating(leaf) else None for leaf in leaves]


def _place(path: str, leaf: Any, layers: Layers) -> Parameter:
    keys = path.split("/")
    depth, index, rest = layers.of(path)
    shape = jnp.shape(leaf)
    if not depth:
        return Parameter(_parts(keys[:-1]), None, (), keys[-1], shape, needs_layer=False)
    inside = [rest, *keys[depth:]] if rest else keys[depth:]
    if not inside:  # an array that is an element of a list
        return Parameter(_parts(keys[: depth - 1]), None, (), keys[-1], shape)
    axis = (layers.stack_axis(path) or 0) if index is None else None
    shape = tuple(length for at, length in enumerate(shape) if at != axis)
    return Parameter(_parts(keys[: depth - 1]), Part(keys[depth - 1]), _parts(inside[:-1]), inside[-1], shape)


def _parts(keys: list[str]) -> tuple[Part, ...]:
    return tuple(Part(key) for key in keys)


def _family(place: Parameter) -> str:
    named = [key for key in (*place.path, place.leaf) if key not in ("kernel", "weight", "w") and not key.isdigit()]
    return named[-1] if named else place.leaf


def _block_name(path: str, granularity: Granularity, layers: Layers) -> str:
    if granularity == "tensor":
        return path
    if granularity == "global":
        return "global"
    depth, _, rest = layers.of(path)
    keys = path.split("/")
    name = "/".join(keys[:depth] if depth else keys[:-1] or keys)
    return name.removesuffix(f"_{rest}") if rest else name
