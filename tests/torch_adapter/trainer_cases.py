"""What the ranks of `test_distributed_trainer.py` run: trainers on two processes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trl.trainer.grpo_trainer as stock
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer
from trl_runs import GROUP, train, whole

from pcr_torch.trl import PCRConfig, PCRTrainer
from pcr_torch.trl import whole_groups as ours

FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    },
}
SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "reference_noise": 0.3, "num_iterations": 1}


def _fsdp_on_cpu(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """Accelerate shards on accelerators only, and leaves the plugin aside on a CPU; gloo can do it."""
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # copied into each new state


_init = AcceleratorState.__init__
AcceleratorState.__init__ = _fsdp_on_cpu


def run(cls: Any, config: Any, folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Gradients of every step, parameters at the end, and what the trainer says."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    dist.barrier()
    set_seed(0)
    trainer, gradients = train(cls, config, folder, out, **options)
    report = getattr(trainer, "last_report", None)
    groups = trainer._buffered_inputs[0].get("pcr_group_ids")
    return {
        "gradients": gradients.steps,
        "parameters": {name: whole(p.detach()) for name, p in trainer.model.named_parameters()},
        "groups": None if groups is None else groups.tolist(),
        "statistics": None if report is None else report.statistics,
        "sharded": all(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "log": trainer.state.log_history,
    }


def compare(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    """The stock trainer and ours with the plain sum, on the same responses in the same micro-batches."""
    settings = SGD | options
    kept = stock.shuffle_sequence_dict, ours.shuffle_groups
    stock.shuffle_sequence_dict, ours.shuffle_groups = lambda batch: batch, lambda batch, ids: batch
    try:
        expected = run(GRPOTrainer, GRPOConfig, folder, out, **settings)
        got = run(PCRTrainer, PCRConfig, folder, out, rule="grpo", **settings)
    finally:
        stock.shuffle_sequence_dict, ours.shuffle_groups = kept
    return {"expected": expected, "got": got}


def resumed(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Three steps with a temporal prior, and the third again from the second's checkpoint."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "prior": "temporal", **options}
    settings |= {"per_device_train_batch_size": GROUP}  # four steps an epoch: the checkpoint lies within one
    whole_run = run(PCRTrainer, PCRConfig, folder, out / "whole", **settings)
    rest = run(PCRTrainer, PCRConfig, folder, out / "rest", resume=str(out / "whole" / "checkpoint-2"), **settings)
    state = torch.load(out / "whole" / "checkpoint-2" / "pcr_state.pt", weights_only=True)
    means = state["method"]["prior"]["stability"]["mean"]
    return {
        "expected": whole_run,
        "got": rest,
        "saved": {name: (type(mean).__name__, tuple(mean.shape)) for name, mean in means.items()},
        "digests": {key: len(state[key]) for key in ("weights", "reference")},
        "refused": refused(folder, out, **settings),
    }


def refused(folder: Path, out: Path, **settings: Any) -> str:
    """What is said of a checkpoint that holds another value of one weight than was saved."""
    changed = out / "changed"
    if dist.get_rank() == 0:
        shutil.copytree(out / "whole" / "checkpoint-2", changed)
        state = torch.load(changed / "pcr_state.pt", weights_only=True)
        state["weights"][next(iter(state["weights"]))] = "of another value"
        torch.save(state, changed / "pcr_state.pt")
        (changed / "checksums.json").unlink()
    dist.barrier()
    try:
        run(PCRTrainer, PCRConfig, folder, out / "rest", resume=str(changed), **settings)
    except ValueError as error:
        return str(error)
    return ""


def run_cases(rank: int, folder: Path, out: Path) -> dict[str, Any]:
    lora = LoraConfig(r=2, target_modules=["up_proj", "q_proj"])
    accumulating = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    straddling = {
        "per_device_train_batch_size": 3 * GROUP // 2,
        "num_iterations": 2,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    bfloat16 = {"bf16": True, "gradient_checkpointing": False}
    results = {"fsdp, bfloat16": compare(folder, out, **bfloat16, **FSDP)}
    for name, sharding in (("ddp", {}), ("fsdp", FSDP)):
        results[f"{name}, accumulating"] = compare(folder, out, **accumulating, **sharding)
        results[f"{name}, straddling"] = compare(folder, out, **straddling, **sharding)
        results[f"{name}, lora"] = compare(
            folder, out, peft_config=lora, reference_noise=0.0, learning_rate=5.0, **sharding
        )
        results[f"{name}, resumed"] = resumed(folder, out / name, **sharding)
    return results
