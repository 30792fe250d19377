"""What a checkpoint of `PCRTrainer` holds besides TRL's own, so that a run goes on where it was, bit for bit.

TRL keeps neither the place within a generation batch nor that batch, and draws the order of prompts from a generator
that each epoch moves on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor

from pcr_torch.checkpoint_files import accepted, newest_whole
from pcr_torch.trl import weights
from pcr_torch.trl.carried_state import state_of
from pcr_train import checksums

_STATE_FILE = "pcr_state.pt"
_WITHIN = ("steps_per_generation", "per_device_train_batch_size")  # what lays out a generation batch


def save(trainer: Any, folder: str) -> None:
    """A collective call on several processes."""
    settings = _settings(trainer)
    state = {
        "method": _whole(state_of(trainer.method, trainer._selection)),
        "step": trainer._step,
        "settings": settings,
        "weights": weights.digests(trainer.model),
        "reference": _reference(trainer),
    }
    os.makedirs(folder, exist_ok=True)
    if trainer.args.should_save:
        Path(folder, checksums.FILE).unlink(missing_ok=True)  # of an earlier one by this name, now to be overwritten
        torch.save(state, os.path.join(folder, _STATE_FILE))
    if trainer._step % _cycle(settings):
        torch.save(trainer._buffered_inputs, _rollouts(trainer, folder))


def load(trainer: Any, folder: str) -> dict[str, Any]:
    """Puts the trainer where it was within a generation batch; returns the state of its `PCR`.

    Raises:
        ValueError: from this checkpoint the run would not go on as it was, with the reason.
    """
    path = os.path.join(folder, _STATE_FILE)
    if not os.path.exists(path):
        raise ValueError(f"checkpoint: {path} is missing; {folder} was not written by PCRTrainer")
    if trainer.args.sync_ref_model:
        raise ValueError("resume_from_checkpoint: TRL saves no reference model, and sync_ref_model has moved it")
    if not trainer.is_fsdp_enabled:
        _refuse_incomplete(folder)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not {"settings", "weights", "reference"} <= state.keys():
        raise ValueError(f"checkpoint: {path} was written by an earlier version")
    weights.refuse_other_reference(trainer.model, trainer.ref_model, folder, state["reference"])
    saved, now = state["settings"], _settings(trainer)
    done, within = divmod(state["step"], _cycle(saved))
    for name in saved:
        if now[name] != saved[name] and (within or name not in _WITHIN):
            raise ValueError(
                f"{name}: {folder} was written with {saved[name]}, by which its prompts and responses are laid out, "
                f"and this run has {now[name]}; resume with the same"
            )
    batches = None
    if within:
        rollouts = _rollouts(trainer, folder)
        if not os.path.exists(rollouts):
            raise ValueError(
                f"checkpoint: {rollouts} is missing. {folder} lies within the use of a generation batch, which can be "
                "resumed on as many processes as it was saved on only"
            )
        batches = torch.load(rollouts, map_location=trainer.accelerator.device, weights_only=True)
    trainer._step, trainer._buffered_inputs = done * _cycle(now) + within, batches
    method: dict[str, Any] = state["method"]
    return method


def restore_weights(trainer: Any, folder: str) -> None:
    """After the trainer has loaded a checkpoint's weights: they are those that were saved, or ValueError."""
    path = os.path.join(folder, _STATE_FILE)
    if os.path.exists(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights.restore(trainer.model, folder, state.get("weights", {}))


def chosen(trainer: Any, asked: str | bool | None) -> str | None:
    """The checkpoint to resume, as `Trainer.train` is asked for it; True is the newest whole one, None is none.

    Raises:
        ValueError: it is damaged or was never finished, or no checkpoint is whole; on every process.
    """
    if not asked:
        return None
    answer: list[str | None] = [None, None]
    if trainer.accelerator.is_main_process:
        try:
            answer[0] = newest_whole(Path(trainer.args.output_dir)) if asked is True else accepted(str(asked))
        except ValueError as error:
            answer[1] = str(error)
    found, refusal = broadcast_object_list(answer)
    if refusal is not None:
        raise ValueError(refusal)
    return str(found)


def draw_epochs(sampler: Any, epochs: int) -> None:
    """Move the order of prompts on by whole epochs, as `epochs` passes over TRL's sampler would."""
    if sampler is not None and sampler.shuffle:
        for _ in range(epochs):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


def _settings(trainer: Any) -> dict[str, int]:
    args, processes = trainer.args, trainer.accelerator.num_processes
    return {
        "num_generations": args.num_generations,
        "num_iterations": args.num_iterations,
        "generation_batch_size": args.generation_batch_size,
        "responses of a step (batch size x accumulation x processes)": (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        ),
        **{name: getattr(args, name) for name in _WITHIN},
    }


def _cycle(settings: dict[str, int]) -> int:
    """Micro-batches that one generation batch serves."""
    return settings["steps_per_generation"] * settings["num_iterations"]


def _reference(trainer: Any) -> dict[str, str]:
    """Digests of the reference model, which stays as it is; where it does not, no checkpoint can be resumed."""
    if trainer.reference_digests is None:
        moves = trainer.args.sync_ref_model
        trainer.reference_digests = {} if moves else weights.reference_digests(trainer.model, trainer.ref_model)
    digests: dict[str, str] = trainer.reference_digests
    return digests


def _rollouts(trainer: Any, folder: str) -> str:
    """Of each process, the generation batch that a checkpoint within its use has to keep."""
    index, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
    return os.path.join(folder, f"pcr_rollouts_{index}_of_{count}.pt")


def _refuse_incomplete(folder: str) -> None:
    for pattern in ("optimizer.pt", "scheduler.pt", "rng_state*.pth"):
        if not any(Path(folder).glob(pattern)):
            raise ValueError(
                f"checkpoint: {folder} has no {pattern} (save_only_model=True leaves it out, or it was deleted), "
                "without which the run would go on differently; resume from a whole checkpoint"
            )


def _whole(state: Any) -> Any:
    """A state whose sharded tensors are gathered, so that any number of processes can load it."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    return {key: _whole(value) for key, value in state.items()} if isinstance(state, dict) else state
