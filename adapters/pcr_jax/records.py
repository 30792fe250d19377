"""Registers the core's records as pytrees: they pass through jit, scan and checkpoints. The core imports no JAX."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import jax

from pcr_core import (
    Baseline,
    BaselineSums,
    BlockStatistics,
    Objective,
    Posterior,
    PriorState,
    Resolution,
    Scatter,
    Weights,
)


def register(record: type[Any], static: tuple[str, ...] = ()) -> None:
    """Make a frozen dataclass a pytree; `static` names hashable fields that are part of its structure."""
    data = [f.name for f in fields(record) if f.name not in static]
    jax.tree_util.register_dataclass(record, data_fields=data, meta_fields=list(static))


for _record in (
    Baseline,
    BaselineSums,
    BlockStatistics,
    Objective,
    Posterior,
    PriorState,
    Resolution,
    Scatter,
    Weights,
):
    register(_record)
