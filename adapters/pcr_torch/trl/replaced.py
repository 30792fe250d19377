"""Attributes and settings of other people's modules that are replaced for a while, and come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """An object (or module) with other attributes of its own."""
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)


@contextmanager
def kept_buffers() -> Iterator[None]:
    """Whatever is compiled keeps what a second backward pass needs.

    Inductor writes into "donated" buffers in the first. Neither its cache on disk nor what this process has compiled
    before knows whether it did, so both are left aside.
    """
    functorch, inductor = (import_module(name) for name in ("torch._functorch.config", "torch._inductor.config"))
    torch._dynamo.reset()
    with functorch.patch(donated_buffer=False), inductor.patch(fx_graph_cache=False):
        yield
