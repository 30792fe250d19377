"""Where layers are in the paths of a pytree: a list index, a numbered name, or a stack of all layers in one array."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

_NUMBERED = re.compile(r"^((?:.*(?:layer|block)s?_?)|h_?)(\d+)$", re.IGNORECASE)
_NUMBERED_BEFORE = re.compile(r"^((?:layer|block|h)_?)(\d+)_(\w+)$")  # haiku's h0_mlp
_STACK = re.compile(r"^(?:(?:\w+_)?(?:layers|blocks)|h)$", re.IGNORECASE)  # MaxText's dense_layers, moe_layers


class Layers:
    """Where layers are in one tree, by the paths and shapes of its leaves; None for leaves that are not floating."""

    def __init__(self, paths: Sequence[str], shapes: Sequence[tuple[int, ...] | None] = ()) -> None:
        prefixes = {key for path in paths for key in itertools.accumulate(path.split("/")[:-1], "{}/{}".format)}
        self._first = {prefix for prefix in prefixes if f"{prefix}_1" in prefixes}  # haiku's block, block_1, block_2
        self._axes: dict[str, int | None] = {}
        stacks: dict[str, list[tuple[int, ...]]] = {}
        for path, shape in zip(paths, shapes, strict=False):
            depth, index, _ = self.of(path)
            if depth and index is None and shape is not None:
                stacks.setdefault(_first_keys(path, depth), []).append(shape)
        for name, found in stacks.items():
            self._axes[name] = _common_axis(found)

    def stack_axis(self, path: str) -> int | None:
        """The axis of the leaf that layers lie along, where it holds a stack of them."""
        depth, index, _ = self.of(path)
        return self._axes.get(_first_keys(path, depth)) if depth and index is None else None

    def of(self, path: str) -> tuple[int, int | None, str]:
        """Number of keys that lead to the outermost layer (0: none), its index (None: a stack), the rest of its key."""
        keys = path.split("/")
        for depth, key in enumerate(keys, start=1):
            numbered, before = _NUMBERED.match(key), _NUMBERED_BEFORE.match(key)
            if key.isdigit() or numbered:
                return depth, int(numbered.group(2) if numbered else key), ""
            if before:
                return depth, int(before.group(2)), before.group(3)
            if _NUMBERED.match(f"{key}_1") and "/".join(keys[:depth]) in self._first:
                return depth, 0, ""
        for depth, key in enumerate(keys, start=1):
            if _STACK.match(key):
                return depth, None, ""
        return 0, None, ""

    def in_list(self, path: str, layer: int) -> str:
        """The path that a leaf of a stack would have for one layer, were the layers a list."""
        depth, keys = self.of(path)[0], path.split("/")
        return "/".join([*keys[:depth], str(layer), *keys[depth:]])

    def stack(self, path: str) -> str:
        """What lies above a leaf's layer; "block" of `block_3`."""
        keys = path.split("/")[: self.of(path)[0]]
        if keys and keys[-1].isdigit():
            return "/".join(keys[:-1])
        numbered = keys and (_NUMBERED.match(keys[-1]) or _NUMBERED_BEFORE.match(keys[-1]))
        return "/".join([*keys[:-1], numbered.group(1).rstrip("_")] if numbered else keys)


def _first_keys(path: str, depth: int) -> str:
    return "/".join(path.split("/")[:depth])


def _common_axis(shapes: Sequence[tuple[int, ...]]) -> int | None:
    """0 or 1, whichever is as long in all arrays of a stack; None where neither is, or no array is a stack of matrices.

    Where both are, the shorter one: there are fewer layers than features.
    """
    lengths = {
        axis: {shape[axis] if len(shape) > axis else 0 for shape in shapes}
        for axis in (0, 1)
        if any(len(shape) > 2 for shape in shapes)
    }
    common = [(found.pop(), axis) for axis, found in lengths.items() if len(found) == 1]
    return min(common)[1] if common else None
