"""Steps between measured ones (`every` > 1): one backward pass, of the streams with the weights measured last."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import pcr_core
from pcr_core import FlatPrior, Rule
from pcr_torch.blocks import Block
from pcr_torch.report import Report


class Every:
    """The last measured report, and how many steps ago it was measured; both unused with every = 1.

    Raises:
        ValueError: `every` is no number of steps, or one pair of weights is not exact for all that is trained.
    """

    def __init__(
        self, every: int, model: nn.Module, blocks: tuple[Block, ...], covered: Collection[str], rule: Rule
    ) -> None:
        if every != 1:
            _refuse_inexact(every, model, blocks, covered, rule)
        self._every, self._blocks = every, blocks
        self._last: Report | None = None
        self._age = 0

    @property
    def due(self) -> bool:
        """Whether this step takes two backward passes and measures."""
        last = self._last
        if last is None or self._age >= self._every - 1 or not last.finite:
            return True
        return not last.statistics.stability_sq.all()  # weights were measured without a KL gradient: there was none yet

    @property
    def last(self) -> Report:
        """The report of the step whose weights are used."""
        assert self._last is not None
        return self._last

    def keep(self, report: Report) -> None:
        """Keeps the report of a measured step, for the steps after it."""
        if self._every > 1:
            self._last, self._age = report, 0

    def passed(self) -> None:
        """Counts a step that has used the weights of an earlier one."""
        self._age += 1

    def pull(self, streams: tuple[int, ...], logp: Tensor, cotangents: tuple[Tensor, ...]) -> None:
        """One backward pass of the weighted streams."""
        weights = self.last.weights.plasticity.item(), self.last.weights.stability.item()
        weighted = [weights[stream] * cotangent for stream, cotangent in zip(streams, cotangents, strict=True)]
        torch.autograd.backward(logp, sum(weighted[1:], start=weighted[0]))

    def state_dict(self) -> dict[str, Any] | None:
        """The last report and its age; None where none is kept."""
        return None if self._last is None else {"age": self._age, **self._last.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from `state_dict()`; without one, the next step measures."""
        state = state if self._every > 1 else None
        self._last = None if state is None else Report.from_state(self._blocks, state)
        self._age = 0 if state is None else int(state["age"])


def _refuse_inexact(
    every: int, model: nn.Module, blocks: tuple[Block, ...], covered: Collection[str], rule: Rule
) -> None:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every: expected an integer >= 1, got {every!r}")
    outside = [name for name, p in model.named_parameters() if p.requires_grad and name not in covered]
    if len(blocks) > 1 or outside:
        what = f"there are {len(blocks)} blocks" if len(blocks) > 1 else f"{outside[0]} is in no block"
        raise ValueError(
            f"every={every}: one backward pass weights both streams alike for all that is trained, and {what}. Use "
            "one block for every trainable parameter (granularity='global' with blocks='all', or LoRA), or every=1"
        )
    if isinstance(rule, pcr_core.PCR) and not isinstance(rule.prior, FlatPrior):
        raise ValueError(
            f"every={every}: {type(rule.prior).__name__} shrinks each step's streams by that step's noise, "
            "which has to be measured; use FlatPrior()"
        )
