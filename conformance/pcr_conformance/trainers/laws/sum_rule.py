"""With the plain sum PCR is GRPO: the step is along the gradient of the whole batch's loss."""

from __future__ import annotations

import pcr_core
from pcr_conformance.trainers.adapter import TrainerAdapter
from pcr_conformance.trainers.checks import same_weights
from pcr_conformance.trainers.draw import Draw
from pcr_conformance.trainers.oracle import expected


def sum_rule_is_the_plain_gradient(adapter: TrainerAdapter, draw: Draw) -> None:
    """One step of `GRPO()` on one microbatch: clip, reference, mask and normalisation are those of GRPO."""
    problem = draw.make(adapter, rule=pcr_core.GRPO())
    same_weights(draw.law, adapter, adapter.train(problem), expected(problem))
