"""One step of `PCR`: micro-batches are pulled into totals, and `resolve` writes their combination to `.grad`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import pcr_core
from pcr_core import Rule, TemporalPrior, Weights
from pcr_core.statistics import Strata
from pcr_torch.accumulated import NOTHING, Accumulated
from pcr_torch.baseline import Applied
from pcr_torch.batch import check_batch
from pcr_torch.blocks import Block
from pcr_torch.combine import longest, of_sum
from pcr_torch.distributed import Ranks, local
from pcr_torch.entrances import Entrances
from pcr_torch.every import Every
from pcr_torch.meter import Meter
from pcr_torch.overwritten import watch_saved
from pcr_torch.parameters import check_parameters
from pcr_torch.paths import Paths
from pcr_torch.report import Report
from pcr_torch.statistics import BlockSums
from pcr_torch.temporal import TemporalFilter
from pcr_torch.update import Part, add_update


class Step(Entrances):
    """What happens between two optimizer steps; `PCR` makes the parts."""

    model: nn.Module
    blocks: tuple[Block, ...]
    rule: Rule
    strata: Strata
    _parameters: dict[str, nn.Parameter]
    _averaged: Sequence[nn.Parameter]  # whose gradients become means over ranks
    _ranks: Ranks | None
    _sharded: bool
    _fsdp: Sequence[FSDPModule]
    _meter: Meter
    _between: Every
    _paths: Paths
    _sums: BlockSums
    _filter: TemporalFilter
    _accumulated: Accumulated
    _watched: bool  # whether functions that overwrite what they saved were looked for

    @property
    def norms(self) -> Literal["fast", "loop", "mixed"]:
        """Which ways `PCR.path` names."""
        ways = {how.partition(":")[0] for how in self._paths.by_parameter().values()}
        return "mixed" if len(ways) > 1 else "loop" if "loop" in ways else "fast"

    def _pull(
        self,
        streams: tuple[int, ...],
        logp: Tensor,
        cotangents: tuple[Tensor, ...],
        group_ids: Tensor,
        applied: Applied | None,
    ) -> None:
        found = self._accumulated
        found.refuse_torn()
        group_ids = check_batch(logp, cotangents, group_ids)
        noise = self.measuring and self._measures_noise
        check_parameters(self.model, self._parameters, fast=noise and self._paths.probes, sharded=self._sharded)
        cotangents = tuple(c.detach() for c in cotangents)
        strata = self._paths.strata(logp, group_ids, self.strata) if noise else None
        found.skipped |= noise and strata is None
        found.torn = True
        if self.measuring and not self._watched and logp.grad_fn is not None:
            watch_saved(logp)
            self._watched = True
        if not self.measuring:
            self._between.pull(streams, logp, cotangents)
        elif strata is None:
            found.add_totals(streams, logp, cotangents, self._fsdp)
        else:
            pulled = found.add_measured(streams, logp, cotangents, strata, self._paths)
            if self._baseline is not None and applied is not None:
                self._baseline.measure(pulled.response[0].sum(dim=-1), applied, group_ids)
        found.microbatches += 1
        found.torn = False

    def resolve(self) -> Report:
        """Decide each block's weights, add a P + b S to the `.grad` of its parameters, and start a new step.

        Like a backward pass it adds to a `.grad` that is there, so gradients of further losses are kept: zero them once
        a step, as always. A block whose gradients are not finite gets a non-finite update and is named in the report.

        On several processes a collective call.

        Raises:
            RuntimeError: nothing was accumulated, or a micro-batch ended within its backward passes.
        """
        found = self._accumulated
        found.refuse_torn()
        if self._ranks is not None and not self._sharded:
            found.average(self._ranks, self._averaged, self._meter)
        elif not found.microbatches:
            raise RuntimeError(NOTHING)
        if not self.measuring:
            return self._passed()
        noise = self._measures_noise
        scatter = (found.scatter or self._sums.no_scatter()) if noise else None
        statistics = self._sums.statistics(found.totals, scatter, joined=found.joined)
        if isinstance(self.rule, pcr_core.PCR) and isinstance(self.rule.prior, TemporalPrior):
            weights = self._filter.weights(self.rule, statistics, found.totals)
            bounds = torch.full_like(statistics.size, math.inf)  # of the means that the filter put in the totals' place
        else:
            weights = self.rule(statistics)
            bounds = longest(weights, statistics)
        weights = replace(weights, finite=weights.finite & self._write(weights, bounds))
        shift = None if self._baseline is None else self._baseline.finish(self._ranks, measured=noise)
        path = self.norms if noise else "autograd"
        report = Report(self.blocks, weights, statistics, path=path, baseline=shift)
        self._between.keep(report)
        self._meter.step(measured=noise)
        self.discard()
        self._probe()
        return report

    def _write(self, weights: Weights[Tensor], bounds: Tensor) -> Tensor:
        """Adds a P + b S to `.grad`, and frees the totals; (blocks,) whether dtypes hold what was added."""
        (a, b), upto = of_sum(weights, self._accumulated.joined), bounds.tolist()
        plasticity, stability = self._accumulated.totals
        block_of = self._sums.block_of.tolist()
        held = add_update(
            Part(p, plasticity.pop(name, None), stability.pop(name, None), a[block], b[block], upto[block])
            for block, (name, p) in zip(block_of, self._parameters.items())
        )
        broken = torch.zeros_like(bounds)
        broken[[block for block, each in zip(block_of, held, strict=True) if not each]] = 1
        if self._ranks is not None and self._sharded:  # each has seen its own part
            broken = self._ranks.sum(broken)
        return broken == 0

    def _passed(self) -> Report:
        """The report of a step between two measured ones, whose weighted gradient is in `.grad` already."""
        last = self._between.last
        self._between.passed()
        self._accumulated.microbatches = 0
        self._probe()
        finite = last.weights.finite & self._gradients_finite()  # there is one block
        shift = None if self._baseline is None else self._baseline.finish(self._ranks, measured=False)
        return replace(last, weights=replace(last.weights, finite=finite), measured=False, baseline=shift)

    @property
    def _measures_noise(self) -> bool:
        """Whether the noise of this step is measured; of all ranks alike."""
        return self._meter.due and not self._accumulated.skipped

    def _probe(self) -> None:
        self._paths.probe(self.measuring and self._meter.due)

    def _gradients_finite(self) -> bool:
        gradients = [local(p.grad) for p in self._parameters.values() if p.grad is not None]
        # a sum is read faster than each number, and says no more often
        finite = bool(torch.stack([g.sum() for g in gradients]).isfinite().all()) if gradients else True
        finite = finite or all(bool(g.isfinite().all()) for g in gradients)
        broken = torch.tensor([0.0 if finite else 1.0], dtype=torch.float64)
        return not bool(broken if self._ranks is None else self._ranks.sum(broken))

    @property
    def measuring(self) -> bool:
        """Whether this step takes two backward passes and measures; false in the steps between, with every > 1."""
        return self._between.due

    @property
    def accumulated(self) -> bool:
        """Whether microbatches wait for `resolve`."""
        return self._accumulated.torn or self._accumulated.microbatches > 0

    def discard(self) -> None:
        """Drop what was accumulated since the last `resolve`. What is in `.grad` stays: zero it as well.

        After an error within `accumulate` (out of memory, say) the step goes on with nothing else: a part of that
        micro-batch is in the gradients.
        """
        self._accumulated.clear()
        if self._baseline is not None:
            self._baseline.discard()
