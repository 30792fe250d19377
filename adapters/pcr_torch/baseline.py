"""The shift of advantages that measured norms call for, from step to step (docs/baseline.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

import pcr_core
from pcr_core import BaselineSums
from pcr_core._numbers import is_number
from pcr_torch.distributed import Ranks

Applied = tuple[Tensor, Tensor | None]  # advantages (n,) as the loss was given them, and weights (n,) of the shift


@dataclass(frozen=True)
class Shift:
    """What the baseline did in a step.

    Attributes:
        applied: b; advantages were lowered by b times their weight.
        reduction: estimated share of P's variance that b took away, `pcr_core.variance_reduction`; None in steps
            without a measurement.
    """

    applied: float
    reduction: float | None


class Baseline:
    """b for the next step, from the norms of the steps that were measured.

    Args:
        share: of the variance-optimal shift, in (0, 1].
        memory: see `pcr_core.update_baseline_sums`.
    """

    def __init__(self, share: float, memory: float = 0.9) -> None:
        if not (is_number(share) and 0 < share <= 1):
            raise ValueError(
                f"baseline: expected the share of the variance-optimal shift, a number in (0, 1], got {share!r}"
            )
        if not (is_number(memory) and 0 <= memory < 1):
            raise ValueError(f"baseline_memory: expected a number in [0, 1), got {memory!r}")
        self.share, self.memory = share, memory
        self._known = self._new = _nothing()
        self.shift = 0.0
        self._asked = False  # whether this step's advantages were shifted

    def shifted(self, advantages: Tensor, weight: Tensor | None) -> Tensor:
        """Advantages (n,) less b times their weight (1 by default)."""
        self._asked = True
        return advantages - self.shift * (torch.ones_like(advantages) if weight is None else weight.to(advantages))

    def check(self, logp: Tensor, advantages: Tensor | None, weight: Tensor | None) -> Applied:
        """What a micro-batch was given; ValueError where it is missing or cannot be."""
        if advantages is None or (self.shift != 0 and not self._asked):
            raise ValueError(
                "baseline: accumulate() needs the advantages that the loss was given; make the loss of applied = "
                "method.shifted(advantages) in every step, and call accumulate(..., advantages=applied)"
            )
        for name, value in (("advantages", advantages), ("weight", weight)):
            if value is not None and value.shape != logp.shape[:1]:
                raise ValueError(f"{name}: expected one a response, shape ({logp.shape[0]},), got {tuple(value.shape)}")
        return advantages.detach(), None if weight is None else weight.detach()

    def measure(self, response_sq: Tensor, applied: Applied, group_ids: Tensor) -> None:
        """A micro-batch's |p_i|^2 (n,), of all blocks."""
        advantages, weight = (None if x is None else x.double().cpu() for x in applied)
        assert advantages is not None
        self._new = self._new + pcr_core.baseline_sums(
            response_sq.double().cpu(), advantages, group_ids=group_ids.cpu(), shift=self.shift, weight=weight
        )

    def finish(self, ranks: Ranks | None, *, measured: bool) -> Shift:
        """What the step did; from now on b is the next one's. A collective call where the step was measured."""
        applied, reduction = self.shift, None
        if measured:
            sums = self._new
            if ranks is not None:
                sums = BaselineSums(*ranks.sum(torch.stack(astuple(sums))).unbind())
            reduction = float(pcr_core.variance_reduction(sums, applied))
            self._known = pcr_core.update_baseline_sums(self._known, sums, memory=self.memory)
            self._estimate()
        self.discard()
        return Shift(applied, reduction)

    def discard(self) -> None:
        """Forget the micro-batches of a step that is not finished."""
        self._new, self._asked = _nothing(), False

    def state_dict(self) -> dict[str, Any]:
        return {"sums": torch.stack(astuple(self._known))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._known = BaselineSums(*state["sums"].double().cpu().unbind())
        self._estimate()
        self.discard()

    def _estimate(self) -> None:
        self.shift = self.share * float(pcr_core.estimate_baseline(self._known).shift)


def _nothing() -> BaselineSums[Tensor]:
    return BaselineSums(*torch.zeros(6, dtype=torch.float64).unbind())
