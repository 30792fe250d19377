"""What the files of a folder held when they were written: `checksums.json`, which is written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from pcr_train.settings import replace_text

FILE = "checksums.json"


def seal(folder: Path) -> None:
    """Writes the checksum of every file that `folder` now holds."""
    files = {path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)] for path in _files(folder)}
    replace_text(folder / FILE, json.dumps(files, indent=0) + "\n")


def is_sealed(folder: Path) -> bool:
    return (folder / FILE).is_file()


def damaged(folder: Path, *, missing: bool = True) -> Path | None:
    """The first file of a sealed folder that is not what was written.

    Args:
        folder: one that `seal` has finished; of another nothing is known, which is an error.
        missing: whether a file that is not there any more counts.
    """
    try:
        files = json.loads((folder / FILE).read_text(encoding="utf-8"))
        expected: dict[Path, tuple[int, str]] = {
            folder / name: (int(size), str(digest)) for name, (size, digest) in files.items()
        }
    except (ValueError, TypeError, AttributeError):
        return folder / FILE
    for path, (size, digest) in expected.items():
        if not path.is_file():
            if missing:
                return path
        elif path.stat().st_size != size or _digest(path) != digest:
            return path
    return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / FILE)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
