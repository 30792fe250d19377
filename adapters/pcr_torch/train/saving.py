"""A model and its tokenizer written to a folder in one move, with checksums."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from pcr_train import checksums


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a model folder in one move, so that an interrupted write leaves nothing half done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as scratch:
        made = Path(scratch) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        checksums.seal(made)
        if folder.exists():
            shutil.rmtree(folder)
        made.replace(folder)
