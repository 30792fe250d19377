"""Two processes that share a batch take the step of one that has it all."""

from __future__ import annotations

from pcr_conformance.trainers.adapter import TrainerAdapter
from pcr_conformance.trainers.checks import same_weights
from pcr_conformance.trainers.draw import Draw
from pcr_conformance.trainers.oracle import expected
from pcr_conformance.trainers.problems import EQUAL, halved_groups, whole_groups


def processes_add_up(adapter: TrainerAdapter, draw: Draw) -> None:
    """Two steps on two processes, with one or two microbatches on each; some with each group on both."""
    whole = draw.make(adapter, groups=EQUAL, steps=2)
    several = "microbatches" in adapter.capabilities
    if "split_groups" in adapter.capabilities and draw.number % 3 == 2:
        draw.problem = halved_groups(whole, 2, 1)
    elif several and draw.number % 2:
        draw.problem = whole_groups(whole, [[[0], [2]], [[3], [1]]])
    else:
        draw.problem = whole_groups(whole, [[[0, 1]], [[2, 3]]])
    same_weights(draw.law, adapter, adapter.train(draw.problem), expected(draw.problem))
