"""The update under any rule, over two steps, is the loop's over per-response gradients."""

from __future__ import annotations

from pcr_conformance.trainers.adapter import TrainerAdapter
from pcr_conformance.trainers.checks import same_weights
from pcr_conformance.trainers.draw import Draw
from pcr_conformance.trainers.oracle import expected


def update_is_the_loops(adapter: TrainerAdapter, draw: Draw) -> None:
    """Two steps, so that what a step leaves behind shows: a gradient not cleared, a prior not carried on."""
    problem = draw.make(adapter, steps=2)
    same_weights(draw.law, adapter, adapter.train(problem), expected(problem))
