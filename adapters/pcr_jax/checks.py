"""Errors that name the argument and the leaf, at trace time where there is one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pcr_jax.blocks import Blocks, is_floating, path_name


def check_floating(tree: Any, name: str) -> None:
    """TypeError naming the first leaf that is not a floating array, or that JAX would narrow."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not is_floating(leaf):
            where = f"{name}: {path_name(path) or 'the leaf'}"
            what = getattr(leaf, "dtype", type(leaf).__name__)
            hint = ""
            if name == "params":
                hint = (
                    "; leave out what is not trained (random keys, counters): with nnx, "
                    "structure, params, rest = nnx.split(model, nnx.Param, ...)"
                )
            raise TypeError(f"{where} is {what}, expected a floating array{hint}")
    check_width(tree, name)


def check_width(tree: Any, name: str) -> None:
    """TypeError naming the first leaf that is float64 while x64 is off.

    Arguments of a compiled function are float32 by the time it is traced, so it has to be called outside.
    """
    if jnp.result_type(float) == jnp.float64:
        return
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if getattr(leaf, "dtype", None) == jnp.float64:
            where = f"{name}: {path_name(path)}" if path else name
            raise TypeError(f"{where} is float64, and JAX would make it float32: cast it, or turn x64 on")


def check_mask(rollouts: Any) -> None:
    """ValueError of a mask of other numbers than 0 and 1; outside a compiled function, where they can be seen."""
    mask: Any = getattr(rollouts, "mask", None)
    if not hasattr(mask, "dtype") or isinstance(mask, jax.core.Tracer) or jnp.issubdtype(mask.dtype, jnp.bool_):
        return
    odd = (mask != 0) & (mask != 1)
    if bool(odd.any()):
        number = float(mask.ravel()[int(odd.argmax())])
        raise ValueError(f"rollouts: mask: expected booleans, or 0 and 1, got {number:g}")


def check_blocks(tree: Any, blocks: Blocks, name: str) -> None:
    """ValueError unless `blocks` were selected on a tree of this structure."""
    paths = tuple(path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0])
    if paths != blocks.paths:
        odd = sorted(set(paths) ^ set(blocks.paths))
        raise ValueError(
            f"{name}: its {len(paths)} leaves are not the {len(blocks.paths)} that the blocks were selected on"
            + (f"; only one of them has {odd[0]}" if odd else "")
        )
