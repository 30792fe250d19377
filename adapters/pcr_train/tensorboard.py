"""TensorBoard files of a run: the numbers of metrics.jsonl as curves, under the tags that TRL gives them.

The writer is tensorboardX. `torch.utils.tensorboard` would need PyTorch, which a run in JAX does without, and all of
TensorBoard with its server, which only the machine that shows the curves needs. TRL's `report_to="tensorboard"` takes
tensorboardX as well, so one extra serves both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcr_train.settings import Settings

FOLDER = "tensorboard"
_SHOWN_APART = ("step", "seconds")


class TensorBoard:
    """Event files in `folder`/tensorboard that hold what `folder`/metrics.jsonl holds, step for step.

    They are written anew from `rows` first, so a resumed run has no step twice, and a run that was started without them
    gets all of its steps.

    Args:
        folder: of the run.
        settings: of the run, shown as text.
        rows: of metrics.jsonl, the steps that were taken before.

    Raises:
        ImportError: tensorboardX is missing.
    """

    def __init__(self, folder: Path, settings: Settings, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        writer = load_writer()
        place = folder / FOLDER
        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = writer(str(place))
        shown = "".join(f"| {name} | {value} |\n" for name, value in settings.__dict__.items() if value is not None)
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{shown}")
        for row in rows:
            self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        """One step's numbers, on disk when this returns; those that are not finite are left out."""
        for tag, value in scalars(row).items():
            self._writer.add_scalar(tag, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def load_writer() -> Any:
    """tensorboardX's SummaryWriter; ImportError that names the package where it is missing."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"--tensorboard needs tensorboardX ({error}); install it with: pip install 'pcr-grpo[tensorboard]'"
        ) from error
    return SummaryWriter


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row of metrics.jsonl by TensorBoard tag, as transformers' own callback names them.

    >>> scalars({"step": 1, "reward": 0.5, "kl": None, "pcr/alpha": 0.5, "seconds": 2.0, "path": "fast"})
    {'train/reward': 0.5, 'train/pcr/alpha': 0.5, 'train/step_time': 2.0}
    """
    found = {f"train/{name}": value for name, value in row.items() if name not in _SHOWN_APART}
    found["train/step_time"] = row.get("seconds")  # as TRL calls it
    return {
        tag: float(value)
        for tag, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
