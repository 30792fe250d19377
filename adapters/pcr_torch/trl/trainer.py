"""`PCRTrainer`: how it is made, and what training does around TRL's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate import DistributedType

from pcr_torch.blocks import FrozenBlocks, Granularity, select_blocks
from pcr_torch.trl import checkpoints
from pcr_torch.trl.config import PCRConfig
from pcr_torch.trl.replaced import kept_buffers, replaced
from pcr_torch.trl.resuming import Resuming
from pcr_torch.trl.separability import compiler_of, refuse_config, refuse_noise, refuse_trainer

_log = logging.getLogger("pcr_torch")


class PCRTrainer(Resuming):
    """`trl.GRPOTrainer` whose update resolves the conflict of reward and KL. Same arguments; `args` is a `PCRConfig`.

    Every optimizer step logs `pcr/conflict_rate`, `pcr/cosine`, `pcr/alpha`, `pcr/boost`, `pcr/removed`, both gradient
    norms and both noise-to-signal ratios; `last_report` holds the full `pcr_torch.Report`. Checkpoints carry the
    temporal prior's state.

    Runs on one process or several, with DDP or FSDP2 (`fsdp_version: 2`): each process logs the same `pcr/` metrics, of
    all processes. `method` is made whenever training starts, from the model as the accelerator prepared it, and gives
    the model's layers their own forward back when training ends; it is made again where layers are frozen or trained in
    turns. Checkpoints hold whole tensors, so PCR's part of them can be resumed on another number of processes.

    Raises:
        TypeError: `args` is not a PCRConfig.
        ValueError: a setting under which the two gradients cannot be told apart, with the reason.
    """

    _tag_names = ("trl", "grpo", "pcr")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if not isinstance(config, PCRConfig):
            raise TypeError(f"args: expected a pcr_torch.trl.PCRConfig (with beta > 0), got {type(config).__name__}")
        config.check()  # options may be set after a config was made
        refuse_config(config)
        if config.torch_compile:
            refuse_noise(config, "torch_compile")
        _without_reentrant(config)
        self._sampler = self._shared = self._pending = self._ones = None
        self._training = self._accumulated = False
        self._generated = []
        self.reference_digests: dict[str, str] | None = None  # taken at the first checkpoint
        super().__init__(*args, **kwargs)
        refuse_trainer(self)
        self._compiler = compiler_of(self.accelerator)
        if self._compiler is not None:
            _without_noise(config, self._compiler)
        self.method = self._bound = self._resumed = None
        self._trained, self._late, self._plain = (), False, False
        try:
            if self.accelerator.distributed_type == DistributedType.NO:
                self._bind(self.model)
                self._release()  # it was made to be told early what cannot be
            else:  # the accelerator wraps the model, or replaces its parameters, when training starts
                select_blocks(self.model, config.blocks, cast(Granularity, config.granularity))
        except FrozenBlocks as error:
            raise ValueError(
                f"{error}. To unfreeze layers in turns, freeze them once training has begun, such as in a callback's "
                "on_train_begin: until one of the blocks is trained, what is trained takes the plain sum"
            ) from error
        self.last_report = None
        for name in ("training_step", "compute_loss"):  # the most derived class's
            setattr(self, name, self._only_while_training(name, getattr(self, name)))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's. The model's layers have their own forward again when it ends, whichever way.

        A damaged checkpoint is refused by the name of its file; `resume_from_checkpoint=True` takes the newest whole
        one of the output folder.
        """
        checkpoint = checkpoints.chosen(self, resume_from_checkpoint)
        watched, stepping = self._watched(self.compute_loss), self._stepping(self.training_step)
        self._training = True
        try:
            # a training step evaluates compute_loss and ends in accelerator.backward(loss), with no hook between
            with (
                replaced(self, compute_loss=watched, training_step=stepping),
                replaced(self.accelerator, backward=self._accumulate),
                kept_buffers() if self._compiler is not None else nullcontext(),
            ):
                return super().train(checkpoint, *args, **kwargs)
        finally:
            self._training = False
            self._release()

    def _only_while_training(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if not self._training and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name} outside of train(): a backward pass of it would be plain GRPO's, since both "
                    "gradients are taken while trainer.train() runs. Call that, under torch.no_grad() for the loss's "
                    "value alone, or use pcr_torch.PCR in a loop of your own (docs/pytorch.md)"
                )
            return method(*args, **kwargs)

        return called


def _without_reentrant(config: PCRConfig) -> None:
    """Reentrant checkpointing hides which response a row belongs to; the other kind has the same gradients."""
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        options = getattr(config, name, None) or {}
        if options.get("use_reentrant"):
            setattr(config, name, {**options, "use_reentrant": False})
            _log.warning(
                "%s: use_reentrant=True hides which response a row of an activation belongs to; taking False, which "
                "has the same gradients", name,
            )  # fmt: skip


def _without_noise(config: PCRConfig, compiler: str) -> None:
    refuse_noise(config, compiler)
    if config.noise_every is None:
        config.noise_every = 0
        _log.warning(
            "%s: in a compiled model the noise of the gradients is not measured; taking noise_every=0", compiler
        )
