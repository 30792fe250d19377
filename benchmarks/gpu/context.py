"""What a part is told: the device, how large problems are, and how long it may take."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Context:
    """Of one part.

    Attributes:
        device: "cuda", also for ROCm, or "cpu".
        toy: sizes at which numbers mean nothing, to see that all of it runs.
        seed: of weights and batches.
        began: when the command did, as `time.monotonic` tells it.
        deadline: when the part has to end.
    """

    device: str
    toy: bool
    seed: int
    began: float
    deadline: float

    def left(self) -> float:
        """Seconds; negative when it is over."""
        return self.deadline - time.monotonic()

    def within(self, seconds: float) -> Context:
        """The same with an earlier deadline."""
        return replace(self, deadline=min(self.deadline, time.monotonic() + seconds))

    def say(self, what: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self.began:6.1f} s] {what}", file=sys.stderr, flush=True)

    def free(self) -> int:
        """Bytes of the device's memory that nobody has."""
        return torch.cuda.mem_get_info()[0] if self.device == "cuda" else 1 << 30


class Cut(Exception):
    """The time is up; the message says what was left out."""
