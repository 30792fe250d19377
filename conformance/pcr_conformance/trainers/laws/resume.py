"""A run that is taken up from a checkpoint goes where it would have gone."""

from __future__ import annotations

import pickle
from dataclasses import replace

from pcr_conformance.trainers.adapter import TrainerAdapter
from pcr_conformance.trainers.checks import same_weights
from pcr_conformance.trainers.draw import TEMPORAL, Draw
from pcr_conformance.trainers.oracle import expected


def resumed_run_goes_on(adapter: TrainerAdapter, draw: Draw) -> None:
    """Three steps, taken up after the first or the second; a prior that is carried comes along, where there is one."""
    rule = TEMPORAL if "state" in adapter.capabilities else draw.rule(adapter)
    problem, done = draw.make(adapter, rule=rule, steps=3), 1 + draw.number % 2
    begun = adapter.train(replace(problem, batches=problem.batches[:done]))
    assert begun.checkpoint is not None, f"{draw.law}: the result holds no checkpoint"
    kept = pickle.loads(pickle.dumps(begun.checkpoint))
    ended = adapter.train(replace(problem, batches=problem.batches[done:]), kept)
    same_weights(draw.law, adapter, ended, expected(problem))
