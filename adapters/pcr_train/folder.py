"""The folder of a run: one run at a time, nothing of others overwritten, and the checkpoint to go on from."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from pcr_train import checksums
from pcr_train.engine import Engine
from pcr_train.settings import Settings

PREPARING = ".pcr-train"
"""Marks a folder in which a run is being prepared, until it has its settings.json."""

_WRITTEN = ("start", "checkpoint-*", "*.json", "metrics.jsonl", "plot.png", "README.md", "tensorboard")
_LOCK = ".pcr-train.lock"
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_SPACE = 1 << 20
_LOCK_SECONDS = 2.0  # a run that was just killed may still hold it


@contextmanager
def alone_in(folder: Path, option: str = "--out") -> Iterator[None]:
    """A lock that the system holds for this process, and takes back when it ends, however that comes about.

    Raises:
        ValueError: another run holds it, or `folder` cannot be written; `option` is what named it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a+")
    except OSError as error:
        raise ValueError(f"{option}: {folder} cannot be written: {error.strerror}") from error
    with file:
        until = time.monotonic() + _LOCK_SECONDS
        while not _locked(file, folder, option):
            if time.monotonic() > until:
                file.seek(0)
                raise ValueError(
                    f"{option}: another run is going on in {folder} (process {file.read().strip() or 'unknown'}); wait "
                    "for its end, or give another --out"
                )
            time.sleep(0.05)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _locked(file: Any, folder: Path, option: str) -> bool:
    """Whether the lock was free, and is now held."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise ValueError(
            f"{option}: {folder} lies on a file system that cannot keep two runs apart ({error.strerror}); give another"
        ) from error
    return True


@contextmanager
def told_when_full(folder: Path, option: str) -> Iterator[None]:
    """Errors of a disk that is full, or cannot be written any more, as ValueError: each library has its own."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        full = shutil.disk_usage(folder).free < _SPACE and not isinstance(error, ValueError)
        if number not in _UNWRITABLE and not full and os.strerror(errno.ENOSPC) not in str(error):
            raise
        why = os.strerror(number if number in _UNWRITABLE else errno.ENOSPC)
        then = f"go on with --resume {folder}" if (folder / "settings.json").exists() else "start the run again"
        raise ValueError(f"{option}: {folder} cannot be written: {why}; make room, and {then}") from error


def claim(folder: Path) -> None:
    """Makes `folder` a new run's; ValueError where it holds what the run would overwrite or delete."""
    if (folder / "settings.json").exists():
        raise ValueError(f"--out: {folder} already holds a run; continue it with --resume {folder}")
    preparing = folder / PREPARING
    foreign = [] if preparing.exists() else [name for pattern in _WRITTEN for name in folder.glob(pattern)]
    if foreign:
        raise ValueError(f"--out: {foreign[0]} is not a run's, which would overwrite or delete it; name another folder")
    preparing.touch()
    shutil.rmtree(folder / "start", ignore_errors=True)


def reclaim(settings: Settings, folder: Path, kind: type[Engine], console: Console) -> Path | None:
    """The checkpoint from which the run in `folder` goes on; None where it stopped before the first was whole.

    Raises:
        ValueError: the settings are not that run's, or its checkpoints are damaged.
    """
    different = Settings.load(folder / "settings.json").differences(settings)
    if different:
        raise ValueError(
            f"--resume: {', '.join('--' + name.replace('_', '-') for name in different)} differs from the run in "
            f"{folder}; leave it out to continue that run, or start a new one with another --out"
        )
    checkpoint = whole_checkpoint(folder, kind, console)
    if settings.steps < step_of(checkpoint):
        raise ValueError(f"--steps: {settings.steps} is less than the {step_of(checkpoint)} steps already taken")
    return checkpoint


def whole_checkpoint(folder: Path, kind: type[Engine], console: Console) -> Path | None:
    """The newest checkpoint that is as it was written. Newer ones are kept under another name, which is told.

    None where none was ever written to its end, which is told as well.

    Raises:
        ValueError: those that were written to their end are damaged, all of them: nothing is renamed, since the run
            would begin anew the next time.
    """
    found, faults = None, []
    for checkpoint in sorted(_checkpoints(folder), key=step_of, reverse=True):
        if not kind.is_complete(checkpoint):
            faults.append((checkpoint, "unfinished", f"{checkpoint} was not written to its end"))
            continue
        file = kind.damaged(checkpoint)
        if file is None:
            found = checkpoint
            break
        faults.append((checkpoint, "damaged", f"{file} is {'damaged' if file.exists() else 'missing'}"))
    lost = [why for _, state, why in faults if state == "damaged"]
    if found is None and lost:
        raise ValueError(
            f"--resume: {', and '.join(lost)}; no other checkpoint in {folder} is whole, so there is none to go on "
            "from. Put a copy of the file back; or delete the checkpoint, and the run begins at its first step"
        )
    goes_on = "begins at its first step" if found is None else f"goes on after {found.name}"
    for checkpoint, state, why in faults:
        kept = _free(folder / f"{state}-{checkpoint.name}")
        checkpoint.rename(kept)
        console.print(f"{why}; it is kept in {kept}, and the run {goes_on}", highlight=False, soft_wrap=True)
    if found is None and not faults:
        console.print(f"{folder} holds no checkpoint yet: the run {goes_on}", highlight=False, soft_wrap=True)
    return found


def refuse_damaged_start(start: Path) -> None:
    """ValueError that names a file of a built-in starting model which is not as it was written."""
    file = checksums.damaged(start) if checksums.is_sealed(start) else None
    if file is not None:
        what = "damaged" if file.exists() else "missing"
        raise ValueError(f"--model: {file} is {what}; delete {start}, and the starting model is made again")


def last_checkpoint(folder: Path, kind: type[Engine]) -> Path | None:
    """The newest checkpoint that was written to its end: a kill may have left a half-written one."""
    return max(filter(kind.is_complete, _checkpoints(folder)), key=step_of, default=None)


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])


def _checkpoints(folder: Path) -> list[Path]:
    """ValueError for what is only named like one: the trainer deletes all but the newest of `checkpoint-*`."""
    found = list(folder.glob("checkpoint-*"))
    for path in found:
        if not path.name.removeprefix("checkpoint-").isdigit():
            raise ValueError(
                f"{path} is no checkpoint of this run, and its name would have the trainer delete it as an old one; "
                "rename it or move it away"
            )
    return found


def _free(path: Path) -> Path:
    """`path`, or with a number behind it where something is already kept under that name."""
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.partition('_')[0]}_{number}")
    return path
