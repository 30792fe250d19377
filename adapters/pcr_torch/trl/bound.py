"""GRPO's trainer, with `PCR` bound to its model for as long as that is trained."""

from __future__ import annotations

import logging
from typing import Any, cast

from pcr_core.statistics import Strata
from pcr_torch.blocks import FrozenBlocks, Granularity
from pcr_torch.method import PCR
from pcr_torch.paths import Norms
from pcr_torch.trl.carried_state import carry, state_of
from pcr_torch.trl.separability import refuse_frozen_within
from pcr_torch.trl.shared_loss import SharedLoss

_log = logging.getLogger("pcr_torch")


class Bound(SharedLoss):
    """`method` is made of the model that the accelerator has prepared, and again where other layers are trained."""

    method: PCR | None
    _pending: Any  # see `two_passes.TwoPasses`
    _accumulated: bool  # whether this step has a micro-batch
    _bound: Any  # the model that `method` is bound to
    _trained: tuple[bool, ...]  # which of its parameters were, when it was bound
    _late: bool  # whether layers were unfrozen within a step
    _resumed: dict[str, Any] | None  # of a checkpoint, until the first step
    _plain: bool  # whether all blocks are frozen for the time being

    def _release(self) -> None:
        self._pending, self._accumulated, self._bound = None, False, None
        if self.method is not None:
            self.method.discard()  # a training that was interrupted may have left a micro-batch behind
            self.method.remove()

    def _bind(self, model: Any) -> PCR:
        """PCR of the prepared model; a new one, with what is known of its blocks, where another was bound."""
        if self.method is not None and self._bound is model:
            return self.method
        config, state = self.args, self._resumed
        if self.method is not None:
            self._release()
            state = state or state_of(self.method, self._selection)
        self._bound, self._trained = model, _trained(model)
        self.method = PCR(
            model,
            blocks=config.blocks,
            granularity=cast(Granularity, config.granularity),
            rule=config.make_rule(),
            strata=cast(Strata, config.strata),
            norms=cast(Norms, config.norms),
            noise_every=config.noise_every,
            every=config.every,
            baseline=config.baseline,
            baseline_memory=config.baseline_memory,
        )
        if state is not None:
            carry(state, self.method, self._selection)
        return self.method

    @property
    def _selection(self) -> tuple[str, str]:
        return self.args.blocks, self.args.granularity

    def _follow_frozen(self) -> None:
        """Bind again where layers were frozen or trained in turns since the last step."""
        if self._bound is None:
            return
        before, now = self._trained, _trained(self._bound)
        if self._accumulated:
            if before != now:
                refuse_frozen_within(self._bound, before, now)
                _log.warning(
                    "layers were unfrozen between the micro-batches of a step: their gradients of this step are the "
                    "plain sum, and their blocks begin with the next one"
                )
                self._trained, self._late = now, True
        elif before != now or self._late:
            bound, self._bound, self._late = self._bound, None, False
            try:
                self._bind(bound)
                self._plain = False
            except FrozenBlocks as error:
                self._plain, self._bound, self._trained = True, bound, now
                _log.warning("%s. Until then what is trained takes the plain sum, without pcr/ metrics", error)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._pending, self._accumulated = None, False
        self._bind(self.model_wrapped).discard()  # where the batch did not fit, this is another try within one `train`
        return prepared


def _trained(model: Any) -> tuple[bool, ...]:
    return tuple(parameter.requires_grad for parameter in model.parameters())
