"""A resumed model holds the weights that were saved, bit for bit, or the run is refused.

transformers saves some models under other names than their parameters have (fused experts, image-text models), and
the trainer then loads what fits and leaves the rest as it started. So a checkpoint keeps a digest of every weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def digests(model: Any) -> dict[str, str] | None:
    """Of every parameter that training may have changed, by name; None of a sharded model, loaded by shards."""
    parameters = dict(model.named_parameters())
    if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        return None
    adapted = hasattr(model, "peft_config")  # its base weights are not in the checkpoint
    return {name: _digest(p) for name, p in parameters.items() if p.requires_grad or not adapted}


def restore(model: Any, folder: str, saved: Mapping[str, str] | None) -> None:
    """Make `model`, after the trainer has loaded `folder`, what was saved there.

    Raises:
        ValueError: it is not, and the model's own `from_pretrained` does not give it either.
    """
    if saved is None:
        return
    different = _different(model, saved)
    if different and hasattr(type(model), "from_pretrained") and not hasattr(model, "peft_config"):
        _reload(model, folder, different)
        different = _different(model, saved)
    if different:
        raise ValueError(
            f"checkpoint: {len(different)} of {len(saved)} weights are not those that were saved in {folder}, such as "
            f"{different[0]}: its files hold other names or values than this model's parameters, and the run would go "
            "on from weights that were not trained. Resume with the model and the version of transformers that saved it"
        )


def _reload(model: Any, folder: str, names: list[str]) -> None:
    """The parameters `names` as the model's class reads them, which knows the names that it saves."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    with torch.random.fork_rng(devices=[]):  # what is not found would be drawn anew
        loaded = dict(type(model).from_pretrained(folder, dtype=widest).named_parameters())
    with torch.no_grad():
        for name in names:
            if name in loaded and loaded[name].shape == model.get_parameter(name).shape:
                model.get_parameter(name).copy_(loaded[name])


def _different(model: Any, saved: Mapping[str, str]) -> list[str]:
    parameters = dict(model.named_parameters())
    return [name for name, digest in saved.items() if name not in parameters or _digest(parameters[name]) != digest]


def _digest(parameter: Tensor) -> str:
    flat = parameter.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).hexdigest()
