"""The shift of advantages that measured norms call for, inside a compiled step (docs/baseline.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

import pcr_core
from pcr_core import BaselineSums
from pcr_core._numbers import is_number
from pcr_core.objective import Normalization
from pcr_jax.records import register


@dataclass(frozen=True)
class Shift:
    """What the baseline did in a step; arrays of shape ().

    Attributes:
        applied: b; advantages were lowered by b, with normalization="grpo" times the response's share of T tokens.
        reduction: estimated share of P's variance that b took away, `pcr_core.variance_reduction`; None in steps
            without a measurement.
    """

    applied: Array
    reduction: Array | None


register(Shift)


def check_baseline(share: float | None, memory: float) -> None:
    if share is not None and not (is_number(share) and 0 < share <= 1):
        raise ValueError(
            f"baseline: expected the share of the variance-optimal shift, a number in (0, 1], got {share!r}"
        )
    if not (is_number(memory) and 0 <= memory < 1):
        raise ValueError(f"baseline_memory: expected a number in [0, 1), got {memory!r}")


def no_sums() -> BaselineSums[Array]:
    """Before the first measurement."""
    return BaselineSums(*(jnp.zeros((), jnp.result_type(float)) for _ in range(6)))


def weights(mask: Array, present: Array | None, normalization: Normalization) -> Array:
    """(n,) of the shift; 0 for rows that only fill up a group."""
    token = (mask != 0).astype(jnp.float32)
    weight = jnp.mean(token, axis=1) if normalization == "grpo" else jnp.ones_like(token[:, 0])
    return weight if present is None else jnp.where(present, weight, 0)


def measured(
    past: BaselineSums[Array],
    response_sq: Array,
    applied: Array,
    weight: Array,
    shift: Array,
    group_size: int,
    memory: Any,
) -> tuple[BaselineSums[Array], Array]:
    """What is known from now on, and the share of P's variance that the shift took away."""
    ids = jnp.arange(applied.shape[0]) // group_size
    sums = pcr_core.baseline_sums(response_sq, applied, group_ids=ids, shift=shift, weight=weight)
    return pcr_core.update_baseline_sums(past, sums, memory=memory), pcr_core.variance_reduction(sums, shift)
