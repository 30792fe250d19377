"""Which positions go through a model's head: on a CPU too, only those whose likelihood is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.trainer import utils


@contextmanager
def completions_only() -> Iterator[None]:
    """Within it, TRL leaves the prompts' positions out of the head on a CPU as it does on a GPU.

    Elsewhere it scores all, for devices that compile anew for every shape. With short answers the prompts are most of
    the head's work. Should TRL rename its switch, runs are slower, nothing else.
    """
    switch = getattr(utils, "_use_triton", None)
    if switch is None:
        yield
        return

    def compact(device: torch.device) -> bool:
        return device.type == "cpu" or bool(switch(device))

    utils._use_triton = compact
    try:
        yield
    finally:
        utils._use_triton = switch
