"""A run depends on its problem alone, and leaves that as it was."""

from __future__ import annotations

import copy

import numpy as np

from pcr_conformance.trainers.adapter import TrainerAdapter
from pcr_conformance.trainers.checks import same_weights
from pcr_conformance.trainers.draw import Draw
from pcr_conformance.trainers.oracle import expected
from pcr_conformance.trainers.problem import TrainerProblem


def calls_are_independent(adapter: TrainerAdapter, draw: Draw) -> None:
    """Two problems one after the other: nothing of the first run is left in the second, nor in the arrays."""
    for other in (1, 0):
        problem = draw.make(adapter, other=other)
        before = copy.deepcopy(problem)
        result = adapter.train(problem)
        _unchanged(draw.law, problem, before)
    same_weights(draw.law, adapter, result, expected(before))


def _unchanged(law: str, problem: TrainerProblem, before: TrainerProblem) -> None:
    for name, weight in before.weights.items():
        assert np.array_equal(problem.weights[name], weight), f"{law}: train overwrote the problem's {name!r}"
    for got, batch in zip(problem.batches, before.batches, strict=True):
        for name, value in vars(batch).items():
            assert np.array_equal(getattr(got, name), value), f"{law}: train overwrote the batch's {name}"
