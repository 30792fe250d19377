"""What is known of blocks goes on where others are trained than before, as with layers that are trained in turns."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pcr_torch.blocks import Block
from pcr_torch.method import PCR

_log = logging.getLogger("pcr_torch")


def state_of(method: PCR, selection: Sequence[str]) -> dict[str, Any]:
    """`method.state_dict()`, with what its blocks are made of, and the options `selection` that chose them."""
    parameters = {block.name: list(block.parameters) for block in method.blocks}
    return {**method.state_dict(), "parameters": parameters, "selection": list(selection)}


def carry(state: Mapping[str, Any], method: PCR, selection: Sequence[str]) -> None:
    """Load a state into PCR of blocks that may be others: those of one name and the same parameters keep theirs.

    A block that was not trained when the state was taken starts afresh.

    Raises:
        ValueError: the blocks are others because the options are.
    """
    same = state["parameters"] == {block.name: list(block.parameters) for block in method.blocks}
    if same or state["selection"] != list(selection):
        method.load_state_dict(state)
        return
    before = {name: k for k, name in enumerate(state["blocks"])}
    kept = [b for b in method.blocks if state["parameters"].get(b.name) == list(b.parameters)]
    prior = (
        None
        if state["prior"] is None
        else {k: _chosen(v, kept, before, method.blocks) for k, v in state["prior"].items()}
    )
    if prior is not None and len(kept) < len(method.blocks):
        _log.warning(
            "blocks: %d of %d were not trained before, and their temporal prior starts afresh",
            len(method.blocks) - len(kept), len(method.blocks),
        )  # fmt: skip
    method.load_state_dict({**state, "prior": prior, "last": None, "blocks": [block.name for block in method.blocks]})


def _chosen(
    stream: Mapping[str, Any], kept: Sequence[Block], before: Mapping[str, int], blocks: Sequence[Block]
) -> dict[str, Any]:
    names = [name for block in kept for name in block.parameters if name in stream["mean"]]
    variance = torch.full((len(blocks),), math.inf, dtype=stream["variance"].dtype)
    for k, block in enumerate(blocks):
        if block in kept:
            variance[k] = stream["variance"][before[block.name]]
    return {"mean": {name: stream["mean"][name] for name in names}, "variance": variance}
