"""What a checkpoint of `PCRTrainer` holds besides TRL's own, so that a run goes on where it was, bit for bit.

TRL keeps neither the place within a generation batch nor that batch, and draws the order of prompts from a generator
that each epoch moves on.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from pcr_torch import weights

_STATE_FILE = "pcr_state.pt"
_WITHIN = ("steps_per_generation", "per_device_train_batch_size")  # what lays out a generation batch


def save(trainer: Any, folder: str) -> None:
    """A collective call on several processes."""
    settings = _settings(trainer)
    state = {
        "method": _whole(trainer.method.state_dict()),
        "step": trainer._step,
        "settings": settings,
        "weights": weights.digests(trainer.model),
        "reference": _reference(trainer),
    }
    os.makedirs(folder, exist_ok=True)
    if trainer.args.should_save:
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


def refuse_damaged(folder: str) -> None:
    """ValueError that names a file of a checkpoint which was cut off."""
    file = damaged(Path(folder))
    if file is not None:
        raise ValueError(
            f"checkpoint: {file} is damaged (cut off in writing, or by a full disk); resume from an earlier checkpoint"
        )


def damaged(folder: Path) -> Path | None:
    """The first file of a checkpoint that is not whole, as its own format tells; None where all are."""
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):  # its directory is at the end
            return file
        if file.suffix == ".safetensors" and not _whole_safetensors(file):
            return file
        if file.name == "trainer_state.json":
            try:
                json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                return file
    return None


def _whole_safetensors(file: Path) -> bool:
    """Whether a file is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 + length or length == 0:
            return False
        try:
            header = json.loads(opened.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


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
