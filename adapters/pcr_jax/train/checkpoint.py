"""Pytrees on disk, by orbax, with checksums of its files; a folder that has its name is complete."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from pcr_train import checksums

Tree = TypeVar("Tree")
_REFERENCE = "reference.txt"


def save(tree: object, folder: Path, *, reference: str | None = None) -> None:
    """Writes `folder` in one move: a run killed meanwhile leaves nothing of that name.

    Args:
        tree: of arrays.
        folder: to be written, over what it holds.
        reference: `digest` of the parameters that the KL divergence is measured to, which `tree` does not hold.
    """
    folder = folder.absolute()
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(unfinished, tree)
    if reference is not None:
        (unfinished / _REFERENCE).write_text(reference, encoding="utf-8")
    checksums.seal(unfinished)
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
    """Whether it was written to its end; one of which files were lost since is complete, and damaged."""
    return checksums.is_sealed(folder) and (folder / "_CHECKPOINT_METADATA").is_file()


def refuse_other_reference(folder: Path, reference: str) -> None:
    """ValueError where the run that saved `folder` measured the KL divergence to other parameters."""
    file = folder / _REFERENCE
    if not file.is_file() or file.read_text(encoding="utf-8") != reference:
        raise ValueError(
            f"reference model: its weights are not those by which {folder} was trained, so the KL divergence would be "
            "to another model. The run's folder start was changed; put back the one that the run was started from"
        )


def digest(tree: object) -> str:
    """Of the arrays of a tree."""
    found = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(tree):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()
