"""What a trainer reports is what its rule decided on."""

from __future__ import annotations

from pcr_conformance.trainers.adapter import TrainerAdapter
from pcr_conformance.trainers.checks import same_statistics
from pcr_conformance.trainers.draw import Draw
from pcr_conformance.trainers.oracle import expected
from pcr_conformance.trainers.problems import whole_groups


def reported_statistics_are_the_loops(adapter: TrainerAdapter, draw: Draw) -> None:
    """Of two steps, in two microbatches where it takes them: sums over the whole batch, not over its last part."""
    whole = draw.make(adapter, steps=2)
    several = "microbatches" in adapter.capabilities
    draw.problem = whole_groups(whole, [[[0, 1], [2, 3]]]) if several else whole
    same_statistics(draw.law, adapter, whole, adapter.train(draw.problem), expected(whole))
