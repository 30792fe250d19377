"""GRPO's trainer, with two backward passes in place of one, and `.grad` written when gradients synchronise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pcr_torch.baseline import Applied
from pcr_torch.distributed import kept_whole, sharded_modules
from pcr_torch.method import PCR
from pcr_torch.pullback import total_dtype
from pcr_torch.report import Report
from pcr_torch.trl.bound import Bound
from pcr_torch.trl.groups import Text
from pcr_torch.trl.lent_batch import lent, lowered
from pcr_torch.trl.shared_forward import Ones, SharedForward
from pcr_torch.trl.terms import is_reentrant, leaves
from pcr_torch.trl.whole_groups import GROUP_IDS, TEXTS, carried_groups

_LENGTH = 1024  # unit of lengths where none is the longest


class TwoPasses(Bound):
    """A training step of TRL whose loss is taken apart, and its backward pass replaced by those of both streams."""

    last_report: Report | None
    _metrics: Any
    # until its backward pass: what a loss is given, its texts and groups, and with a baseline its advantages
    _pending: tuple[SharedForward, tuple[list[Text], list[int]], tuple[Applied, list[Text]] | None] | None
    _ones: Ones | None

    def _stepping(self, training_step: Callable[..., Any]) -> Callable[..., Any]:
        """The most derived class's step; it may have left out the backward pass of the last micro-batch."""

        def stepping(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            self._pending = None
            if self.accelerator.sync_gradients:
                self._finish()
            return loss

        return stepping

    def _watched(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        """The most derived class's loss, in training evaluated so that `_accumulate` can take it apart."""

        def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return compute_loss(model, inputs, *args, **kwargs)
            self._follow_frozen()
            if self._ones is None:
                dtype = total_dtype(next(p for p in self.model.parameters() if p.requires_grad))
                self._ones = Ones(self.accelerator.device, dtype)
            self._shared = shared = SharedForward(self._ones)
            applied = self._applied(inputs)
            self._pending = shared, carried_groups(inputs), applied
            try:
                with (
                    nullcontext() if applied is None else lowered(inputs, applied[0][0]),
                    lent(inputs, shared.advantages, (GROUP_IDS, TEXTS)),
                ):
                    loss = compute_loss(model, inputs, *args, **kwargs)
                shared.returned(loss)
                return loss
            finally:
                self._shared = None

        return watched

    def _applied(self, inputs: dict[str, Any]) -> tuple[Applied, list[Text]] | None:
        """With a baseline: the advantages lowered by it, each response's weight in it, and the texts they belong to."""
        method = self.method
        if self.args.baseline is None or method is None or self._plain:
            return None
        advantages, mask = inputs.get("advantages"), inputs["completion_mask"]
        if not isinstance(advantages, Tensor) or advantages.ndim != 1:
            raise ValueError("baseline: it shifts advantages of responses, so inputs['advantages'] has to be (n,)")
        weight = None
        if self.args.loss_type == "grpo":  # divides by the response's length
            tokens = mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]
            weight = tokens.sum(dim=1) / (self.args.max_completion_length or _LENGTH)
        return (method.shifted(advantages, weight), weight), self._texts_of(inputs)

    def _accumulate(self, loss: Tensor, **kwargs: Any) -> None:
        """In place of `accelerator.backward`."""
        assert self.method is not None
        if self._pending is None or self._shared is not None or not self._pending[0].made(loss):
            self._backward_of_another(loss, **kwargs)
            return
        (shared, carried, applied), self._pending = self._pending, None
        loss = loss / self.accelerator.gradient_accumulation_steps
        streams = shared.streams(loss, self.model, sharded=self.is_fsdp_enabled, beta=self._beta)
        if streams is not None:
            request = streams.cut.request
            ids, mask, kept = request["input_ids"], request["attention_mask"], request["logits_to_keep"]
            rows = {"prompt_ids": ids[:, :-kept], "prompt_mask": mask[:, :-kept], "completion_ids": ids[:, -kept:]}
            rows["pixel_values"] = request.get("pixel_values")
            group_ids = self._with_groups(rows, *carried)[GROUP_IDS]
            logp, plasticity, stability = streams.cut.logp, streams.plasticity, streams.stability
            if self.args.norms != "fast" and self.args.noise_every != 0 and is_reentrant(logp):
                raise ValueError(
                    "model: a reentrant checkpoint (torch.utils.checkpoint with use_reentrant=True) hides which "
                    "response a row of an activation belongs to; set use_reentrant=False, norms='fast' if "
                    "activations are (responses, tokens, features) throughout, or noise_every=0 to do without"
                )
            if streams.router is not None and streams.cut.router is not None:
                self._add_router(streams.cut.router, streams.router)
            if self._plain:
                torch.autograd.backward(logp, plasticity + stability)
            else:
                (advantages, weight), given = applied or ((None, None), [])
                if applied is not None and self._texts_of(rows) != given:
                    raise ValueError(
                        "baseline: rows were dropped, repeated, moved or rewritten within the loss, so it is not known "
                        "which advantage each was given; change the batch before compute_loss, or do without baseline"
                    )
                self.method.accumulate_cotangents(
                    logp, plasticity, stability, group_ids=group_ids, advantages=advantages, weight=weight
                )
            self._accumulated, self._resumed = True, None
        elif self.accelerator.num_processes > 1:
            raise ValueError(
                "loss: it does not depend on the model, and on several processes all take part in a step; return 0 * "
                "loss to leave a micro-batch out"
            )
        if self.accelerator.sync_gradients:
            self._finish()

    def _add_router(self, loss: Tensor, weight: Tensor) -> None:
        """The gradient of a router loss, of neither stream, to .grad of all that is trained, where `resolve` adds."""
        if loss.requires_grad:
            with kept_whole(sharded_modules(self.model)):
                torch.autograd.backward(loss, weight, retain_graph=True)

    def _finish(self) -> None:
        """The gradients of a step, from all of its micro-batches."""
        accumulated, self._accumulated = self._accumulated, False
        if accumulated and not self._plain and self.method is not None:
            self._resolve(self.method)

    def _backward_of_another(self, loss: Tensor, **kwargs: Any) -> None:
        """Of a loss that another model is trained with, such as a critic."""
        trained = {id(p) for p in self.model.parameters()}
        if any(id(leaf) in trained for leaf in leaves(loss)):
            raise ValueError("loss: it trains the model and does not come from self.compute_loss(model, inputs)")
        if self._pending is not None and self._pending[0].trains(loss):
            raise ValueError(
                "loss: a backward pass of it is asked for before compute_loss has returned, or it is not the loss "
                "that was returned; return the whole of it, and leave its backward pass to training_step"
            )
        type(self.accelerator).backward(self.accelerator, loss, **kwargs)

    def _resolve(self, method: PCR) -> None:
        self.last_report = method.resolve()
        logged = self.last_report.metrics()
        if self.args.every > 1:
            logged["pcr/measured"] = float(self.last_report.measured)
        if self.args.log_layers:
            logged |= self.last_report.layer_metrics()
        for key, value in logged.items():
            self._metrics["train"][key].append(value)
