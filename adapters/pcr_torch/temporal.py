"""The temporal prior over a model's gradients: a scalar Kalman filter per block and stream (math.md section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pcr_core
from pcr_core import BlockStatistics, Scatter
from pcr_torch.distributed import like, local, split
from pcr_torch.pullback import total_dtype
from pcr_torch.statistics import BlockSums, Totals

_STREAMS = ("plasticity", "stability")


class TemporalFilter:
    """Posterior means of both streams, one buffer a stream, and their variances."""

    def __init__(self, sums: BlockSums) -> None:
        self._sums = sums
        self._state: dict[str, Any] | None = None

    def weights(
        self, rule: pcr_core.PCR, statistics: BlockStatistics[Tensor], totals: Totals
    ) -> pcr_core.Weights[Tensor]:
        """Replaces the totals by the posterior means, and gives the weights of those."""
        unknown = torch.full((self._sums.blocks,), math.inf, dtype=torch.float64)
        previous = self._state or {stream: {"mean": {}, "variance": unknown} for stream in _STREAMS}
        posteriors = rule.posteriors(
            statistics, (previous["plasticity"]["variance"], previous["stability"]["variance"])
        )
        # a step that is not finite is no evidence: its update is NaN, and the filter of that block waits
        finite = pcr_core.GRPO()(statistics).finite
        state: dict[str, Any] = {}
        for stream, mine, posterior in zip(_STREAMS, totals, posteriors, strict=True):
            gains = posterior.gain.tolist()
            means: dict[str, Tensor] = {}
            for block, (name, parameter) in zip(self._sums.block_of.tolist(), self._sums.parameters.items()):
                mean = previous[stream]["mean"].get(name)
                if mean is None:
                    mean = torch.zeros_like(local(parameter), dtype=total_dtype(parameter))
                mean = mean.to(parameter.device)
                filtered = mean * (1 - gains[block])
                if name in mine:
                    filtered.add_(mine[name], alpha=gains[block])
                means[name] = filtered.clone() if bool(finite[block]) else mean
                mine[name] = filtered
            variance = torch.where(finite, posterior.variance, previous[stream]["variance"])
            state[stream] = {"mean": means, "variance": variance}
        self._state = state
        scatter = Scatter(posteriors[0].variance, posteriors[1].variance, statistics.covariance)
        return rule.project(self._sums.statistics(totals, scatter, merged=True))

    def state_dict(self) -> dict[str, Any] | None:
        """None before the first step. Means of sharded parameters are DTensors."""
        return self._changed(like)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._state = state
        self._state = self._changed(split)

    def _changed(self, change: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any] | None:
        """The state with change(mean, parameter) for each mean."""
        if self._state is None:
            return None
        parameters = self._sums.parameters
        return {
            stream: {**kept, "mean": {name: change(mean, parameters[name]) for name, mean in kept["mean"].items()}}
            for stream, kept in self._state.items()
        }
