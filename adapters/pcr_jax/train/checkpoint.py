"""Pytrees on disk, by orbax; a folder that has its name is complete."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

Tree = TypeVar("Tree")


def save(tree: object, folder: Path) -> None:
    """Writes `folder` in one move: a run killed meanwhile leaves nothing of that name."""
    folder = folder.absolute()
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(unfinished, tree)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def load(folder: Path, like: Tree) -> Tree:
    """The tree saved in `folder`, with the shapes and dtypes of `like`, on the default device.

    Raises:
        ValueError: it holds another tree, or is not whole.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            tree: Tree = checkpointer.restore(folder.absolute(), jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"checkpoint: {folder} could not be read: {str(error).splitlines()[0]}") from error
    # not bound to the device: a step compiled for arrays that are not would be compiled again for those that are
    loaded: Tree = jax.tree.map(lambda x: jax.device_put(np.asarray(x)), tree)
    return loaded


def is_complete(folder: Path) -> bool:
    """Whether orbax finished it."""
    return (folder / "_CHECKPOINT_METADATA").is_file()
