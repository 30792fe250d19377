"""Which leaves of a pytree of parameters PCR acts on, and how they are grouped into blocks.

JAX models have no common class, so everything goes by the path of a leaf, such as `layers/0/mlp/up/kernel`: the keys,
indices and attributes that lead to it. "mlp" takes the matrices that lie in a layer, or in a module named mlp, ffn or
feed_forward, and not in attention, an embedding, a norm or a router. A layer is a list index (`layers/0`, nnx and pure
JAX), a numbered name (`block_0`, linen), or a stack of all layers in one array (`layers/...`, nn.scan), which makes one
block of them all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from pcr_core._selection import selects

Granularity = Literal["tensor", "layer", "global"]
Selector: TypeAlias = str | Callable[[str, Any], bool | str | None]

_NUMBERED = re.compile(r"^(.*(layer|block)s?_?|h_?)(\d+)$", re.IGNORECASE)
_STACK = re.compile(r"^(layers|blocks|h)$", re.IGNORECASE)
_MLP = re.compile(r"(^|_)(mlp|ffn|ffw|feed_?forward)|^mlp", re.IGNORECASE)
_NOT_MLP = re.compile(r"attn|attention|mixer|mamba|ssm|norm|embed|rotary|^ln", re.IGNORECASE)
_ROUTER = re.compile(r"^(gate|router|shared_expert_gate)$")
_ATTENTION_WEIGHT = re.compile(r"^(w_?)?(q|k|v|o|qkv|kv)(_proj|_einsum)?$|^(query|key|value)$")
_VECTOR = re.compile(r"^(bias|scale|b\d*)$")  # has two dimensions where layers are stacked
_VARIABLE = re.compile(r"/(raw_)?value$")  # nnx keeps arrays inside variables


@dataclass(frozen=True)
class Blocks:
    """Blocks over the leaves of one pytree structure; hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        names: of the blocks, in the order of all arrays "per block": the leaf or layer each is named after.
        layers: index of the layer that each block lies in, None outside layers and for blocks of several.
        sizes: number of coordinates of each block.
        paths: of all leaves of the tree, in `jax.tree.leaves` order.
        of_leaf: index of each leaf's block, None for leaves outside the blocks.
    """

    names: tuple[str, ...]
    layers: tuple[int | None, ...]
    sizes: tuple[int, ...]
    paths: tuple[str, ...]
    of_leaf: tuple[int | None, ...]

    @property
    def leaves(self) -> tuple[int, ...]:
        """Indices of the leaves that lie in a block."""
        return tuple(k for k, block in enumerate(self.of_leaf) if block is not None)

    @property
    def stacks(self) -> tuple[str | None, ...]:
        """What numbers the layer of each block, such as "encoder/layers"; None where `layers` is None."""
        first = [self.paths[self.of_leaf.index(block)] for block in range(len(self.names))]
        return tuple(None if i is None else _stack(path) for i, path in zip(self.layers, first, strict=True))


def select_blocks(params: Any, blocks: Selector = "mlp", granularity: Granularity = "tensor") -> Blocks:
    """Blocks of a pytree's floating leaves (arrays, tracers or `jax.ShapeDtypeStruct`).

    Args:
        params: any pytree: nnx state, linen variables, dicts and lists of arrays.
        blocks: "mlp"; "all"; a regular expression searched for in leaf paths such as "layers/0/up/kernel"; or a
            callable (path, leaf) -> True, False, or the name of the block to put it in.
        granularity: a block per "tensor", "layer" or one "global" block. A callable that returns names overrides it.

    Raises:
        ValueError: nothing matches, or `granularity` is not an option.
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
    members: dict[str, list[int]] = {}
    for k, (path, leaf) in enumerate(flat):
        label = selects(blocks, path, leaf, _is_mlp(path, leaf))
        if label is not False and is_floating(leaf):
            members.setdefault(label if isinstance(label, str) else _block_name(path, granularity), []).append(k)
    if not members:
        some = ", ".join(paths[:: max(1, len(paths) // 4)][:5]) or "none"
        hint = " 'mlp' needs layers; give a regular expression instead." if blocks == "mlp" else ""
        raise ValueError(f"blocks: {blocks!r} matches no floating leaf.{hint} Leaves include: {some}")
    of_leaf: list[int | None] = [None] * len(flat)
    for block, rows in enumerate(members.values()):
        for k in rows:
            of_leaf[k] = block
    layers = [{_layer(paths[k])[1] for k in rows} for rows in members.values()]
    return Blocks(
        names=tuple(members),
        layers=tuple(found.pop() if len(found) == 1 else None for found in layers),
        sizes=tuple(sum(int(flat[k][1].size) for k in rows) for rows in members.values()),
        paths=paths,
        of_leaf=tuple(of_leaf),
    )


def path_name(path: Any) -> str:
    """A key path of `jax.tree_util` as "layers/0/up/kernel"."""
    return _VARIABLE.sub("", str(jax.tree_util.keystr(path, simple=True, separator="/")))


def is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _is_mlp(path: str, leaf: Any) -> bool:
    keys = path.split("/")
    depth, _ = _layer(path)
    inside = keys[depth:]
    if getattr(leaf, "ndim", 0) < 2 or not inside or _VECTOR.match(keys[-1]):
        return False
    if not depth and not any(_MLP.search(key) for key in keys):
        return False
    return not any(_NOT_MLP.search(key) or _ROUTER.match(key) or _ATTENTION_WEIGHT.match(key) for key in inside)


def _layer(path: str) -> tuple[int, int | None]:
    """How many keys lead to the outermost layer (0: it lies in none), and that layer's index (None: a stack)."""
    keys = path.split("/")
    for depth, key in enumerate(keys, start=1):
        numbered = _NUMBERED.match(key)
        if key.isdigit() or numbered:
            return depth, int(numbered.group(3) if numbered else key)
    for depth, key in enumerate(keys, start=1):
        if _STACK.match(key):
            return depth, None
    return 0, None


def _stack(path: str) -> str:
    """What lies above a leaf's layer; "block" of `block_3`."""
    keys = path.split("/")[: _layer(path)[0]]
    numbered = _NUMBERED.match(keys[-1])
    return "/".join([*keys[:-1], numbered.group(1).rstrip("_")] if numbered else keys[:-1])


def _block_name(path: str, granularity: Granularity) -> str:
    if granularity == "tensor":
        return path
    if granularity == "global":
        return "global"
    depth, _ = _layer(path)
    keys = path.split("/")
    return "/".join(keys[:depth] if depth else keys[:-1] or keys)
