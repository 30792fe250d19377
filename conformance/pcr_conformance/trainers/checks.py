"""Where a trainer's weights and statistics may lie, given the dtype it computes in."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from pcr_conformance.laws.checks import close, near
from pcr_conformance.trainers.adapter import TrainerAdapter
from pcr_conformance.trainers.oracle import Loop
from pcr_conformance.trainers.problem import TrainerProblem, TrainerResult
from pcr_core import BlockStatistics, needs_noise

#: of the sum of the norms of what is added up: some hundred roundings, through softmax, two matrices and a few steps
RELATIVE = {"float64": 1e-12, "float32": 1e-5}
NOISE = ("plasticity_var", "stability_var", "covariance")


def same_weights(law: str, adapter: TrainerAdapter, result: TrainerResult, loop: Loop) -> None:
    """Each weight is where the loop took it."""
    assert isinstance(result, TrainerResult), f"{law}: train returned {type(result).__name__}, not a TrainerResult"
    lacking = set(loop.weights) - set(result.weights)
    assert not lacking, f"{law}: the result lacks the weights {sorted(lacking)}"
    for name, weight in loop.weights.items():
        got = np.asarray(result.weights[name], dtype=np.float64)
        assert got.shape == weight.shape, f"{law}: {name} has shape {got.shape}, expected {weight.shape}"
        stored = 4 * float(np.finfo(adapter.dtype).eps) * float(np.linalg.norm(weight))
        near(law, f"weight {name!r}", got, weight, stored + RELATIVE[adapter.dtype] * loop.sizes[name])


def same_statistics(
    law: str, adapter: TrainerAdapter, problem: TrainerProblem, result: TrainerResult, loop: Loop
) -> None:
    """What each step's rule decided on; the noise may be None where the rule does not read it."""
    steps = len(result.statistics)
    assert steps == len(loop.statistics), f"{law}: statistics of {steps} steps, expected {len(loop.statistics)}"
    for number, (got, true, (p, s)) in enumerate(zip(result.statistics, loop.statistics, loop.streams, strict=True)):
        allowed = {"plasticity_sq": p * p, "stability_sq": s * s, "dot": p * s, "size": 0 * p}
        allowed |= {"plasticity_var": 2 * p * p, "stability_var": 2 * s * s, "covariance": 2 * p * s}  # m/(m - 1) <= 2
        for name in (f.name for f in fields(BlockStatistics)):
            value: Any = getattr(got, name)
            if value is None and name in NOISE and not needs_noise(problem.rule):
                continue
            assert value is not None, f"{law}: {name} of step {number} is None, and the rule reads the noise"
            close(law, f"{name} of step {number}", value, getattr(true, name), RELATIVE[adapter.dtype] * allowed[name])
