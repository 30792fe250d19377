"""Which laws of trainers there are, and what each needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pcr_conformance.trainers import laws
from pcr_conformance.trainers.adapter import TrainerAdapter
from pcr_conformance.trainers.draw import Draw


@dataclass(frozen=True)
class TrainerLaw:
    """A law and the capabilities without which it does not apply."""

    check: Callable[[TrainerAdapter, Draw], None]
    needs: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return self.check.__name__

    def applies(self, adapter: TrainerAdapter) -> str | None:
        """Why the law is not for this adapter, or None."""
        lacking = self.needs - adapter.capabilities
        return f"needs {', '.join(sorted(lacking))}" if lacking else None


TRAINER_LAWS: tuple[TrainerLaw, ...] = (
    TrainerLaw(laws.sum_rule_is_the_plain_gradient),
    TrainerLaw(laws.update_is_the_loops, frozenset({"rules"})),
    TrainerLaw(laws.padding_does_not_matter),
    TrainerLaw(laws.order_does_not_matter),
    TrainerLaw(laws.reward_scale_goes_through),
    TrainerLaw(laws.learning_rate_scales_the_step),
    TrainerLaw(laws.calls_are_independent),
    TrainerLaw(laws.microbatches_add_up, frozenset({"microbatches"})),
    TrainerLaw(laws.parts_of_groups_add_up, frozenset({"split_groups"})),
    TrainerLaw(laws.processes_add_up, frozenset({"processes"})),
    TrainerLaw(laws.resumed_run_goes_on, frozenset({"resume"})),
    TrainerLaw(laws.reported_statistics_are_the_loops, frozenset({"statistics"})),
)
