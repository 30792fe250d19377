"""What the micro-batches since the last `resolve` have added up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import pcr_core
from pcr_core import Scatter
from pcr_torch.distributed import Ranks, average
from pcr_torch.meter import Meter
from pcr_torch.paths import Paths
from pcr_torch.pullback import Pulled, total_dtype
from pcr_torch.statistics import BlockSums, Totals
from pcr_torch.totals import part, pull_totals

NOTHING = "resolve() before accumulate(): there are no gradients to resolve"


class Accumulated:
    """Totals of both streams, and the scatter of the responses' contributions to them.

    Args:
        parameters: the block parameters by name.
        sums: over the parameters of each block.

    Attributes:
        totals: P and S; but their sum in the place of stream `joined`.
        joined: 0, 1, or None where the totals are P and S.
        scatter: None where no noise was measured.
        microbatches: how many there were.
        skipped: whether the noise of one of them was to be measured, and was not.
        torn: whether a micro-batch ended within its backward passes.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], sums: BlockSums) -> None:
        self._parameters, self._sums = parameters, sums
        self.clear()

    def clear(self) -> None:
        self.totals: Totals = ({}, {})
        self.joined: int | None = None
        self.scatter: Scatter[Tensor] | None = None
        self.microbatches = 0
        self.skipped = self.torn = False

    def refuse_torn(self) -> None:
        """Raises RuntimeError after a micro-batch that ended within its backward passes."""
        if self.torn:
            raise RuntimeError(
                "an earlier accumulate() ended within its backward passes (out of memory, an interrupt, an error in "
                "them), and left a part of that micro-batch in the gradients. Call discard() and zero the gradients, "
                "then take the step's micro-batches again"
            )

    def add_totals(
        self,
        streams: tuple[int, ...],
        logp: Tensor,
        cotangents: tuple[Tensor, ...],
        fsdp: Sequence[FSDPModule],
    ) -> None:
        """Each stream's gradient, by automatic differentiation alone."""
        if len(streams) == 1:
            self.part()
        self.joined = pull_totals(
            logp,
            cotangents,
            self._parameters,
            [self.totals[stream] for stream in streams],
            joined=self.joined,
            fresh=not self.microbatches,
            fsdp=fsdp,
        )

    def add_measured(
        self, streams: tuple[int, ...], logp: Tensor, cotangents: tuple[Tensor, ...], ids: Tensor, paths: Paths
    ) -> Pulled:
        """Each stream's gradient, and the scatter of both within the strata `ids`."""
        self.part()
        strata: list[list[int]] = [[] for _ in range(int(ids.max()) + 1)]
        for row, q in enumerate(ids.tolist()):
            strata[q].append(row)
        pulled = paths.pull(logp, cotangents, strata, [self.totals[stream] for stream in streams])
        scatter = self._sums.scatter(streams, pulled, ids)
        self.scatter = scatter if self.scatter is None else pcr_core.merge(self.scatter, scatter)
        return pulled

    def part(self) -> None:
        """Makes the totals P and S, where the streams' sum was in the place of one of them."""
        part(self.totals, self.joined)
        self.joined = None

    def average(self, ranks: Ranks, averaged: Sequence[nn.Parameter], meter: Meter) -> None:
        """Totals and gradients become means over ranks: what some lack is zero there, what all lack stays absent."""
        held = [[name in totals for name in self._parameters] for totals in self.totals]
        graded = [parameter.grad is not None for parameter in averaged]
        mine = [self.microbatches > 0, self.skipped, self.joined == 0, self.joined == 1, self.joined is None]
        mine[4] &= mine[0]
        anywhere = ranks.sum(torch.tensor([*mine, *held[0], *held[1], *graded]).double())
        accumulated, self.skipped, first, second, apart, *present = (anywhere > 0).tolist()
        if not accumulated:
            raise RuntimeError(NOTHING)
        if first + second + apart > 1:
            self.part()
        elif first or second:  # also of a rank without microbatches
            self.joined = int(second)
        if self.skipped and meter.optional and meter.every:
            meter.stop("another process cannot measure it")
        flags, tensors = iter(present), []
        for totals in self.totals:
            for name, parameter in self._parameters.items():
                if next(flags):
                    if name not in totals:
                        totals[name] = torch.zeros_like(parameter, dtype=total_dtype(parameter))
                    tensors.append(totals[name])
        for parameter in averaged:
            if next(flags):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                tensors.append(parameter.grad)
        average(tensors, ranks)
