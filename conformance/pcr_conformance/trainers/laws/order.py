"""Responses and groups come in any order, under any ids."""

from __future__ import annotations

from dataclasses import replace

from pcr_conformance.trainers.adapter import TrainerAdapter
from pcr_conformance.trainers.checks import same_weights
from pcr_conformance.trainers.draw import Draw
from pcr_conformance.trainers.oracle import expected


def order_does_not_matter(adapter: TrainerAdapter, draw: Draw) -> None:
    """Responses shuffled across groups, and groups under other ids, take the same step."""
    problem, rng = draw.make(adapter), draw.rng
    batch = problem.batches[0]
    names = rng.permutation(1000)[: batch.group_ids.max() + 1] - 500
    shuffled = replace(batch, group_ids=names[batch.group_ids]).rows(rng.permutation(batch.size).tolist())
    draw.problem = replace(problem, batches=(shuffled,))
    same_weights(draw.law, adapter, adapter.train(draw.problem), expected(problem))
