"""Which way the noise of each block parameter is measured: by probes in the two backward passes, or by the loop.

The probes (`recorder.py`) measure plain linear layers while the gradients of both streams are formed. The loop
(`pullback.py`) takes a backward pass per response and stream, and is right for any parameter. The autograd graph of
each micro-batch decides which way a parameter takes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pcr_core.statistics import Strata
from pcr_torch.batch import strata_of
from pcr_torch.distributed import Ranks
from pcr_torch.meter import Meter
from pcr_torch.pullback import Pulled, Total, backward_others, per_response
from pcr_torch.recorder import Recorder

Norms = Literal["auto", "fast", "loop"]
_log = logging.getLogger("pcr_torch")


class Paths:
    """The probes on a model's layers, and the parameters that take the loop, with the reason.

    Args:
        model: the module itself, without a wrapper.
        parameters: the block parameters by name.
        norms: see `PCR`.
        meter: in which steps the noise is measured; it is stopped where measuring is optional and would be slow.
        workspace: see `PCR`.
        ranks: the processes of a sharded model; else None.

    Raises:
        ValueError: norms="fast" with parameters outside plain linear layers, or the loop on a sharded model.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        *,
        norms: Norms,
        meter: Meter,
        workspace: int,
        ranks: Ranks | None,
    ) -> None:
        recorder = Recorder(model, parameters, workspace)
        if norms == "fast" and recorder.uncovered:
            name, why = next(iter(recorder.uncovered.items()))
            raise ValueError(
                f"norms='fast' measures plain linear layers only; {name}: {why} ({len(recorder.uncovered)} such "
                "parameters). Use norms='auto', which takes the loop for these alone, or other blocks"
            )
        if ranks is not None and meter.every and (norms == "loop" or (recorder.uncovered and not meter.optional)):
            raise ValueError(
                "norms='loop' differentiates by whole weights, which a sharded model does not have; use norms='fast' "
                f"and blocks in plain linear layers (outside of them: {list(recorder.uncovered)[:3]}), or no sharding"
            )
        self._parameters, self._meter, self._ranks = parameters, meter, ranks
        self._others = [p for name, p in model.named_parameters() if name not in parameters]
        self._trusting = norms == "fast"
        self._recorder = None if norms == "loop" or len(recorder.uncovered) == len(parameters) else recorder
        self._looped: dict[str, str] = {} if norms == "loop" else dict(recorder.uncovered)
        if self._looped and meter.optional:
            meter.stop(next(f"{name}: {why}" for name, why in self._looped.items()))
        elif self._looped and meter.every:
            self._tell(self._looped)

    @property
    def probes(self) -> bool:
        """Whether any parameter may be measured by probes."""
        return self._recorder is not None

    def probe(self, on: bool) -> None:
        """Puts probes on the layers for a step that measures, and takes them off for the others."""
        if self._recorder is not None:
            (self._recorder.install if on else self._recorder.remove)()

    def by_parameter(self) -> dict[str, str]:
        """ "fast", or "loop" with the reason, for each block parameter, as last decided."""
        if self._recorder is None and not self._looped:
            return dict.fromkeys(self._parameters, "loop: norms='loop'")
        return {name: f"loop: {self._looped[name]}" if name in self._looped else "fast" for name in self._parameters}

    def strata(self, logp: Tensor, group_ids: Tensor, strata: Strata) -> Tensor | None:
        """Stratum of each response, where the noise is to be measured; None where it may be left out, and costs much.

        Raises:
            ValueError: it may not be left out, and cannot be measured.
        """
        why: str | None = None
        ids: Tensor | None = None
        try:
            ids = strata_of(group_ids, strata)
        except ValueError as error:
            if not self._meter.optional:
                raise
            why = str(error)
        if self._recorder is not None:
            looped = self._recorder.survey(logp, trusting=self._trusting)
            if self._trusting or not (looped and self._meter.optional):
                self._take_loop(looped)
            elif why is None:
                why = next(f"{name}: {reason}" for name, reason in looped.items())
        late = self._recorder is not None and self._recorder.late
        if self._ranks is not None and self._meter.optional:  # all ranks have to take the same passes
            elsewhere = self._ranks.sum(torch.tensor([why is not None], dtype=torch.float64))
            why = why or ("another process cannot measure it" if bool(elsewhere) else None)
        if why is None:
            return ids
        if not late:  # else the forward pass was before the probes, and the next step will do
            self._meter.stop(why)
        return None

    def _take_loop(self, looped: dict[str, str]) -> None:
        """For block parameters that the fast path cannot measure, with the reason; ValueError where it may not be."""
        if looped and (self._trusting or self._ranks is not None):
            name, why = next(iter(looped.items()))
            raise ValueError(
                f"{name} cannot be measured on the fast path: {why} ({len(looped)} such parameters). "
                + ("Leave it out of the blocks" if self._ranks is not None else "Use norms='auto' or norms='loop'")
            )
        if looped.keys() != self._looped.keys():
            self._tell({name: why for name, why in looped.items() if name not in self._looped})
        self._looped = looped

    def pull(
        self, logp: Tensor, cotangents: tuple[Tensor, ...], strata: list[list[int]], totals: Sequence[Total]
    ) -> Pulled:
        """Each stream's gradient into `totals`, and the inner products of responses and strata; frees the graph.

        Call `strata` first: it decides which way each parameter takes.
        """
        if self._recorder is None:
            pulled = per_response(logp, cotangents, self._parameters, strata, totals)
            backward_others(logp, cotangents, self._others)
            return pulled
        alone = {name: p for name, p in self._parameters.items() if name in self._looped}
        kept = [parameter.grad for parameter in alone.values()]
        by_loop = per_response(logp, cotangents, alone, strata, totals) if alone else None
        pulled = self._recorder.pull(logp, cotangents, strata, totals, skipped=alone)
        if by_loop is not None:
            columns = [k for k, name in enumerate(self._parameters) if name in alone]
            pulled.response[:, :, columns] = by_loop.response
            pulled.stratum[:, :, columns] = by_loop.stratum
        for parameter, gradient in zip(alone.values(), kept, strict=True):
            parameter.grad = gradient  # their streams are in the totals, and the passes of the others added the sum
        return pulled

    def _tell(self, looped: Mapping[str, str]) -> None:
        """Once for each parameter: an update takes a backward pass per response and stream because of it."""
        if looped:
            name, why = next(iter(looped.items()))
            _log.warning(
                "%d of %d block parameters take one backward pass per response and stream, such as %s: %s. "
                "PCR(model).path lists them; leave them out of the blocks for speed",
                len(looped), len(self._parameters), name, why,
            )  # fmt: skip
