"""Whether the files of a checkpoint are whole: written to their end, and as they were written."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from pcr_train import checksums

_log = logging.getLogger("pcr_torch")


def finish(folder: str, rotate: Callable[[], object]) -> None:
    """After a checkpoint was written: read it back, and only where it is whole seal it and delete older ones."""
    file = damaged(Path(folder))
    if file is not None:
        _log.warning("checkpoint: %s is damaged as soon as it was written; older checkpoints are kept", file)
        return
    checksums.seal(Path(folder))
    rotate()


def accepted(folder: str) -> str:
    if not os.path.isdir(folder):
        raise ValueError(f"resume_from_checkpoint: {folder} is not a folder")
    if not is_complete(Path(folder)):
        raise ValueError(f"checkpoint: {folder} was not written to its end; resume from an earlier checkpoint")
    refuse_damaged(folder)
    return folder


def newest_whole(folder: Path) -> str:
    """The rest is passed over, with a warning."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        file = damaged(checkpoint)
        if is_complete(checkpoint) and file is None:
            return str(checkpoint)
        why = f"{file} is damaged" if file else "it was not written to its end"
        _log.warning("checkpoint: %s is passed over: %s", checkpoint, why)
    raise ValueError(
        f"resume_from_checkpoint: {folder} holds no whole checkpoint"
        + (f" ({len(numbered)} are damaged or were not written to their end)" if numbered else "")
    )


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written to its end, where the trainer's state and then the checksums are written."""
    state = folder / "trainer_state.json"
    return state.is_file() and (checksums.is_sealed(folder) or _is_json(state))


def refuse_damaged(folder: str) -> None:
    """ValueError that names a file of a checkpoint which is not as it was written."""
    sealed = checksums.is_sealed(Path(folder))
    file = checksums.damaged(Path(folder), missing=False) if sealed else damaged(Path(folder))
    if file is not None:
        raise ValueError(
            f"checkpoint: {file} is damaged (cut off in writing or by a full disk, or changed since); resume from an "
            f"earlier checkpoint" + (f", or delete {checksums.FILE} if it was changed on purpose" if sealed else "")
        )


def damaged(folder: Path) -> Path | None:
    """The first file of a checkpoint that is not whole, by its checksums or by what its format tells."""
    if checksums.is_sealed(folder):
        return checksums.damaged(folder)
    return next((file for file in sorted(folder.rglob("*")) if file.is_file() and not _is_whole(file)), None)


def _is_whole(file: Path) -> bool:
    if file.suffix in (".pt", ".pth", ".bin"):
        try:
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
        except zipfile.BadZipFile:
            return False
    if file.suffix == ".safetensors":
        return is_whole_safetensors(file)
    return file.suffix != ".json" or _is_json(file)


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def is_whole_safetensors(file: Path) -> bool:
    """Whether a file is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 + length or length == 0:
            return False
        try:
            header = json.loads(opened.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)
