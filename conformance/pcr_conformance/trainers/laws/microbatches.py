"""However a batch is split into microbatches, its update is one."""

from __future__ import annotations

from pcr_conformance.trainers.adapter import TrainerAdapter
from pcr_conformance.trainers.checks import same_weights
from pcr_conformance.trainers.draw import Draw
from pcr_conformance.trainers.oracle import expected
from pcr_conformance.trainers.problems import EQUAL, halved_groups, whole_groups

EVEN = ([[0, 1], [2, 3]], [[0], [1], [2], [3]])
UNEVEN = ([[0, 1, 2], [3]], [[2], [0, 3, 1]])


def microbatches_add_up(adapter: TrainerAdapter, draw: Draw) -> None:
    """Whole groups in each: the update is that of the undivided batch, noise included."""
    choices = EVEN + UNEVEN if "unequal_microbatches" in adapter.capabilities else EVEN
    whole = draw.make(adapter, steps=2)
    parts = choices[(draw.number + draw.number // len(choices)) % len(choices)]
    draw.problem = whole_groups(whole, [parts])
    same_weights(draw.law, adapter, adapter.train(draw.problem), expected(whole))


def parts_of_groups_add_up(adapter: TrainerAdapter, draw: Draw) -> None:
    """Each group in two microbatches: the noise is that within the parts, all else that of the undivided batch."""
    draw.problem = halved_groups(draw.make(adapter, groups=EQUAL, steps=2), 1, 2)
    same_weights(draw.law, adapter, adapter.train(draw.problem), expected(draw.problem))
