"""A batch as a loss is given it: the trainer's own dict, which keeps what the loss writes into it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def lent(batch: MutableMapping[str, Any], tag: Callable[[Tensor], Tensor], hidden: Collection[str]) -> Iterator[None]:
    """The batch with tagged advantages and without `hidden` entries, both undone at the end.

    A generation batch is used several times, so what a loss changes or adds has to be there the next time, as under the
    stock trainer.

    Example:
        >>> batch = {"advantages": torch.ones(2), "groups": [0, 0]}
        >>> tag = torch.ones((), requires_grad=True)
        >>> with lent(batch, lambda values: values * tag, ["groups"]):
        ...     _ = batch["advantages"].mul_(2)
        ...     batch["seen"] = True
        >>> batch
        {'advantages': tensor([2., 2.]), 'seen': True, 'groups': [0, 0]}
    """
    kept = {name: batch.pop(name) for name in hidden if name in batch}
    given = batch.get("advantages")
    tagged = tag(given) if isinstance(given, Tensor) else given
    if given is not None:
        batch["advantages"] = tagged
    try:
        yield
    finally:
        found = batch.get("advantages")
        if found is tagged and isinstance(given, Tensor) and isinstance(tagged, Tensor):
            batch["advantages"] = given
            if not torch.equal(given, tagged):  # worked on in place
                with torch.no_grad():
                    given.copy_(tagged)
        elif isinstance(found, Tensor):
            batch["advantages"] = found.detach()
        for name, value in kept.items():
            batch.setdefault(name, value)


@contextmanager
def lowered(batch: MutableMapping[str, Any], advantages: Tensor) -> Iterator[None]:
    """The batch with these advantages in place of its own, which are back at the end unless others were put there.

    Example:
        >>> batch = {"advantages": torch.ones(2)}
        >>> with lowered(batch, batch["advantages"] - 0.5):
        ...     print(batch["advantages"])
        tensor([0.5000, 0.5000])
        >>> batch["advantages"]
        tensor([1., 1.])
    """
    given, batch["advantages"] = batch["advantages"], advantages
    try:
        yield
    finally:
        if batch.get("advantages") is advantages:
            batch["advantages"] = given
