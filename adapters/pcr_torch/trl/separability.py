"""Settings and losses of which the reward and the KL gradient can be told apart; others are refused with the reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pcr_core import needs_noise

NEITHER = "PCR resolves the gradients of a reward and a KL term of one forward pass; what belongs to neither is refused"
_KERNELS = (
    "fused kernels may overwrite in one backward pass what a second one needs, which autograd does not notice; what "
    "a model gets from the hub is not known beforehand; use the model's own layers"
)
SHIFTABLE_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo")
SEPARABLE_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


def refuse_beta(config: Any) -> None:
    if not 0 < config.beta < math.inf:
        raise ValueError(
            "beta: PCR arbitrates between reward and KL, and TRL's default of 0 leaves no KL gradient; "
            f"set beta > 0, such as 0.04 (got {config.beta})"
        )


def refuse_baseline(config: Any) -> None:
    """ValueError for settings under which a shift of the advantages would bias the gradient (docs/baseline.md)."""
    if config.loss_type not in SHIFTABLE_LOSSES:
        raise ValueError(
            f"baseline: loss_type={config.loss_type!r} is not in proportion to the advantage; use one of "
            f"{', '.join(SHIFTABLE_LOSSES)}"
        )
    biased = {
        "mask_truncated_completions": config.mask_truncated_completions,
        "top_p": config.top_p != 1.0,
        "top_k": bool(config.top_k),
        "min_p": bool(config.min_p),
        "off_policy_mask_threshold": config.off_policy_mask_threshold is not None,
    }
    for name, is_set in biased.items():
        if is_set:
            raise ValueError(
                f"baseline: with {name} a shift of all advantages changes the expected gradient, since which responses "
                "or tokens count depends on what was drawn; leave one of them out"
            )


def refuse_config(config: Any) -> None:
    """ValueError for settings of a `PCRConfig` that are known to be wrong before any model is loaded."""
    if config.enable_jit_checkpoint:
        raise ValueError("enable_jit_checkpoint: it saves within a step, from where a run does not go on as it was")
    if config.deepspeed is not None:
        raise ValueError("deepspeed: its engine owns the backward pass and the gradients, so there is no place for two")
    if config.fp16:
        raise ValueError("fp16: the loss scaler would scale one loss of two; use bf16=True or float32")
    if config.entropy_coef != 0 or config.use_adaptive_entropy:
        raise ValueError("entropy_coef: the entropy bonus belongs to neither stream; set it to 0")
    if (config.model_init_kwargs or {}).get("use_kernels"):
        raise ValueError(f"model_init_kwargs: {_KERNELS}")
    checkpointing = any(getattr(config, f"{name}_checkpointing", False) for name in ("gradient", "activation"))
    without = any((config.liger_kernel_config or {}).get(name) is False for name in ("swiglu", "geglu"))
    if config.use_liger_kernel and not (checkpointing or without):
        raise ValueError(
            "use_liger_kernel: the backward passes of Liger's SwiGLU and GEGLU overwrite what they saved, which the "
            "second of two passes needs. Set gradient_checkpointing=True, with which it is computed anew, or "
            "liger_kernel_config={'swiglu': False} ('geglu' for Gemma's models)"
        )
    optimizer = str(getattr(config.optim, "value", config.optim))
    if optimizer.endswith("layerwise") or optimizer in ("lomo", "adalomo"):
        raise ValueError(f"optim: {optimizer!r} steps within the backward pass, before the gradients are resolved")
    if config.loss_type not in SEPARABLE_LOSSES:
        raise ValueError(f"loss_type: {config.loss_type!r} is not known to be a sum of a reward and a KL term")
    if config.per_device_train_batch_size < 2:
        raise ValueError(
            "per_device_train_batch_size: the variance is estimated among the responses of a micro-batch, which needs "
            "two; accumulate fewer and larger micro-batches"
        )
    if config.strata == "group":
        # slices of processes and of micro-batches begin at multiples of batch, groups at multiples of group, so every
        # part of a group is a multiple of their common divisor, on any number of processes
        batch, group = config.per_device_train_batch_size, config.num_generations
        if math.gcd(batch, group) < 2:
            raise ValueError(
                f"per_device_train_batch_size: {batch} cuts groups of num_generations={group} into single responses, "
                "and the variance is estimated within the groups of a micro-batch; use a multiple of num_generations "
                "(or a divisor >= 2), or strata='batch'"
            )


def refuse_noise(config: Any, compiler: str) -> None:
    """ValueError where the noise is to be measured in a model that `compiler`, an option, compiles."""
    why = f"{compiler}: the noise of the gradients is measured in linear layers that run uncompiled"
    if needs_noise(config.make_rule()):
        raise ValueError(
            f"{why}, and rule={config.rule!r} with these options reads it in every step. Take one that needs none, "
            "such as rule='pcr' with a number as alpha, or do not compile"
        )
    if config.noise_every:
        raise ValueError(f"{why}, and noise_every={config.noise_every} asks for it; set it to 0, or do not compile")


def compiler_of(accelerator: Any) -> str | None:
    """The option by which accelerate was asked to compile the model."""
    plugin = getattr(accelerator.state, "dynamo_plugin", None)
    return None if plugin is None or plugin.backend.value == "NO" else f"dynamo_backend {plugin.backend.value.lower()}"


def refuse_frozen_within(model: Any, before: Sequence[bool], now: Sequence[bool]) -> None:
    """ValueError for a layer that was frozen between two micro-batches of a step."""
    for (name, _), trained, trains in zip(model.named_parameters(), before, now, strict=True):
        if trained and not trains:
            raise ValueError(
                f"{name} was frozen between the micro-batches of a step, whose gradients are not resolved yet; freeze "
                "and unfreeze layers between optimizer steps (on_step_begin or on_step_end of a callback)"
            )


def refuse_trainer(trainer: Any) -> None:
    """ValueError for what shows only once a `PCRTrainer` has its model and accelerator."""
    accelerator = trainer.accelerator
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError("fsdp_version: FSDP1 flattens weights, which hides them from PCR; set fsdp_version: 2")
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError(
            "parallelism_config: tensor, context and sequence parallel split a response over processes, and its "
            "gradient's norm with it; use data parallel dimensions only"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError("DataParallel copies the model within one process; start one process a GPU")
    if str(accelerator.distributed_type.value).upper() in ("DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(f"{accelerator.distributed_type.value}: its engine owns the backward pass, so there is no "
                         "place for two")  # fmt: skip
    if accelerator.scaler is not None:
        raise ValueError("mixed precision with a loss scaler (fp16) would scale one loss of two; use bf16 or float32")
    if getattr(trainer.model, "use_kernels", False):
        raise ValueError(f"model: {_KERNELS}")
