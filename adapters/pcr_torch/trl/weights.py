"""A resumed model holds the weights that were saved, bit for bit, or the run is refused.

transformers saves some models under other names than their parameters have (fused experts, image-text models), and
the trainer then loads what fits and leaves the rest as it started. So a checkpoint keeps a digest of every weight, and
of the reference model, which no checkpoint holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def digests(model: Any) -> dict[str, str]:
    """Of every parameter and persistent buffer that training may have changed, by name.

    A collective call where the model is sharded: a digest is of the whole tensor, on any number of processes.
    """
    adapted = hasattr(model, "peft_config")  # its frozen weights are not in the checkpoint, see `reference_digests`
    return {
        name: _digest(tensor)
        for name, tensor in _held(model).items()
        if not adapted or tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter)
    }


def reference_digests(model: Any, reference: Any) -> dict[str, str]:
    """Of the reference model; where adapters are trained and there is none, of the weights they leave alone."""
    if reference is not None:
        return {name: _digest(tensor) for name, tensor in _held(reference).items()}
    return {name: _digest(p) for name, p in model.named_parameters() if not p.requires_grad}


def refuse_other_reference(model: Any, reference: Any, folder: str, saved: Mapping[str, str]) -> None:
    """ValueError where the KL divergence would be measured to another model than before the checkpoint."""
    now = reference_digests(model, reference)
    known = _held(model if reference is None else reference)  # adapters may be frozen and trained in turns
    different = [name for name in saved if now.get(name, saved[name]) != saved[name] or name not in known]
    if different:
        raise ValueError(
            f"reference model: {len(different)} of its {len(saved)} weights are not those by which {folder} was "
            f"trained, such as {different[0]}, so the KL divergence would be to another model. The folder that it is "
            "loaded from was changed, or another model was given; resume with the one that the run was started from"
        )


def restore(model: Any, folder: str, saved: Mapping[str, str]) -> None:
    """Make `model`, after the trainer has loaded `folder`, what was saved there. Collective where it is sharded.

    Raises:
        ValueError: it is not, and the model's own `from_pretrained` does not give it either.
    """
    different = _different(model, saved)
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())  # saved by its own names
    if different and hasattr(type(model), "from_pretrained") and not (sharded or hasattr(model, "peft_config")):
        _reload(model, folder, different)
        different = _different(model, saved)
    if different:
        raise ValueError(
            f"checkpoint: {len(different)} of {len(saved)} weights are not those that were saved in {folder}, such as "
            f"{different[0]}: its files hold other names or values than this model's parameters, and the run would go "
            "on from weights that were not trained. Resume with the model and the version of transformers that saved it"
        )


def _held(model: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers, shared ones once."""
    held: dict[str, Tensor] = dict(model.named_parameters())
    for place, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                held[f"{place}.{name}" if place else name] = buffer
    return held


def _reload(model: Any, folder: str, names: list[str]) -> None:
    """The tensors `names` as the model's class reads them, which knows the names that it saves."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    with torch.random.fork_rng(devices=[]):  # what is not found would be drawn anew
        loaded = _held(type(model).from_pretrained(folder, dtype=widest))
    held = _held(model)
    with torch.no_grad():
        for name in names:
            if name in held and name in loaded and loaded[name].shape == held[name].shape:
                held[name].copy_(loaded[name])


def _different(model: Any, saved: Mapping[str, str]) -> list[str]:
    held = _held(model)
    return [name for name, digest in saved.items() if name not in held or _digest(held[name]) != digest]


def _digest(tensor: Tensor) -> str:
    if isinstance(tensor, DTensor):  # where shards are offloaded to the CPU, its processes may be unable to gather them
        moved: Any = tensor.detach().to(tensor.device_mesh.device_type)
        tensor = moved.full_tensor()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).hexdigest()
