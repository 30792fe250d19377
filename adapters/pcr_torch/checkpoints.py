"""What a checkpoint of `PCRTrainer` holds besides TRL's own, so that a run goes on where it was, bit for bit.

TRL keeps neither the place within a generation batch nor that batch, and draws the order of prompts from a generator
that each epoch moves on.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor

from pcr_torch import weights
from pcr_torch.carried_state import state_of
from pcr_train import checksums

_log = logging.getLogger("pcr_torch")
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


def finish(folder: str, rotate: Callable[[], object]) -> None:
    """After a checkpoint was written: read it back, and only where it is whole seal it and delete older ones."""
    file = damaged(Path(folder))
    if file is not None:
        _log.warning("checkpoint: %s is damaged as soon as it was written; older checkpoints are kept", file)
        return
    checksums.seal(Path(folder))
    rotate()


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
            answer[0] = _newest_whole(Path(trainer.args.output_dir)) if asked is True else _accepted(str(asked))
        except ValueError as error:
            answer[1] = str(error)
    found, refusal = broadcast_object_list(answer)
    if refusal is not None:
        raise ValueError(refusal)
    return str(found)


def _accepted(folder: str) -> str:
    if not os.path.isdir(folder):
        raise ValueError(f"resume_from_checkpoint: {folder} is not a folder")
    if not is_complete(Path(folder)):
        raise ValueError(f"checkpoint: {folder} was not written to its end; resume from an earlier checkpoint")
    refuse_damaged(folder)
    return folder


def _newest_whole(folder: Path) -> str:
    """The rest is passed over, with a warning."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        file = damaged(checkpoint)
        if is_complete(checkpoint) and file is None:
            return str(checkpoint)
        why = f"{file} is damaged" if file else "it was not written to its end"
        _log.warning("checkpoint: %s is passed over: %s", checkpoint, why)
    raise ValueError(
        f"resume_from_checkpoint: {folder} holds no whole checkpoint"
        + (f" ({len(numbered)} are damaged or were not written to their end)" if numbered else "")
    )


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written to its end, where the trainer's state and then the checksums are written."""
    state = folder / "trainer_state.json"
    return state.is_file() and (checksums.is_sealed(folder) or _is_json(state))


def refuse_damaged(folder: str) -> None:
    """ValueError that names a file of a checkpoint which is not as it was written."""
    sealed = checksums.is_sealed(Path(folder))
    file = checksums.damaged(Path(folder), missing=False) if sealed else damaged(Path(folder))
    if file is not None:
        raise ValueError(
            f"checkpoint: {file} is damaged (cut off in writing or by a full disk, or changed since); resume from an "
            f"earlier checkpoint" + (f", or delete {checksums.FILE} if it was changed on purpose" if sealed else "")
        )


def damaged(folder: Path) -> Path | None:
    """The first file of a checkpoint that is not whole, by its checksums or by what its format tells."""
    if checksums.is_sealed(folder):
        return checksums.damaged(folder)
    return next((file for file in sorted(folder.rglob("*")) if file.is_file() and not _is_whole(file)), None)


def _is_whole(file: Path) -> bool:
    if file.suffix in (".pt", ".pth", ".bin"):
        try:
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
        except zipfile.BadZipFile:
            return False
    if file.suffix == ".safetensors":
        return is_whole_safetensors(file)
    return file.suffix != ".json" or _is_json(file)


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def is_whole_safetensors(file: Path) -> bool:
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
