"""GRPO's trainer, whose loss is evaluated so that its reward term and its KL term can be told apart."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from pcr_torch.trl.lent_batch import lent
from pcr_torch.trl.shared_forward import SharedForward
from pcr_torch.trl.whole_groups import WholeGroups

_REQUEST = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[1:]


class SharedLoss(WholeGroups):
    """While a loss is evaluated, beta and advantages are tagged, and forward passes of the trained model shared."""

    _shared: SharedForward | None  # while a loss is evaluated
    _beta: float

    @property
    def beta(self) -> float:
        """The KL coefficient; while a loss is evaluated, tagged, so that its KL term can be told."""
        return self._beta if self._shared is None else self._shared.beta(self._beta)

    @beta.setter
    def beta(self, value: float) -> None:
        self._beta = float(value)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; within a loss, of the trained model, one forward pass a text, whose graph is kept for the streams."""
        real = super()._get_per_token_logps_and_entropies
        request = dict(zip(_REQUEST, args, strict=False)) | kwargs  # classes below may take *args, **kwargs
        plain = partial(self.accelerator.unwrap_model, keep_torch_compile=False)
        if self._shared is None or not torch.is_grad_enabled() or plain(request["model"]) is not plain(self.model):
            return real(*args, **kwargs)
        entropies = request.pop("compute_entropy", False)
        with_router = request.pop("compute_aux_loss", False)
        request["compute_aux_loss"] = with_router or self.aux_loss_enabled  # one forward pass, whoever asks first
        left_out = ("model", "batch_size")  # the batch size changes no value
        key = {k: v for k, v in request.items() if k not in left_out and v is not None and v is not False}
        key["state"] = _state(self.model)
        cut = self._shared.find(key)
        if cut is None:
            logp, entropy, router = real(**request, compute_entropy=True)
            if not logp.requires_grad:  # a reference that is the model without its adapters
                return logp, entropy if entropies else None, router if with_router else None
            cut = self._shared.cut(key, logp, entropy, router)
        return cut.leaf, cut.entropies if entropies else None, cut.router_leaf if with_router else None

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        if self._shared is None:
            return super()._compute_loss(model, inputs)
        if not isinstance(inputs.get("advantages"), Tensor):
            raise ValueError(
                "inputs: the batch has no tensor 'advantages', by which the reward's term is told; keep it"
            )
        if self._shared.advantages(inputs["advantages"]) is inputs["advantages"]:
            return super()._compute_loss(model, inputs)
        if self.args.baseline is not None:
            raise ValueError(
                "baseline: a class above puts advantages of its own in the batch's place within its loss, after the "
                "baseline was subtracted; make them in the reward functions, or do without the baseline"
            )
        with lent(inputs, self._shared.advantages, ()):  # a class above has put others in their place
            return super()._compute_loss(model, inputs)


def _state(model: Any) -> list[Any]:
    """What decides on a model's output besides its weights: dropout, and which adapters are on."""
    adapters = [m for m in model.modules() if hasattr(m, "_disable_adapters")]  # of PEFT
    return [model.training, *((m._disable_adapters, m._active_adapter) for m in adapters)]
