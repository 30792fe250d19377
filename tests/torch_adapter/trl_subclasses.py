"""Trainers derived from stock's and from PCRTrainer, to compare, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl_runs import relative_error, train

from pcr_torch.trl import PCRConfig, PCRTrainer

ONE_STEP = {"max_steps": 1, "reference_noise": 0.3}


def derived(base: Any, **methods: Any) -> Any:
    """A class whose methods get their base's as the first argument."""

    def bound(name: str, method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return method(getattr(super(made, self), name), self, *args, **kwargs)

        return call

    made: Any = type("Derived", (base,), {name: bound(name, method) for name, method in methods.items()})
    return made


def against_stock(folder: Path, out: Path, *, options: dict[str, Any] | None = None, **methods: Any) -> float:
    """How far the plain sum's gradients of a derived trainer are from those of the stock trainer derived alike."""
    settings = ONE_STEP | (options or {})
    _, expected = train(derived(GRPOTrainer, **methods), GRPOConfig, folder, out, **settings)
    _, got = train(derived(PCRTrainer, **methods), PCRConfig, folder, out, rule="grpo", **settings)
    assert len(got.steps) == len(expected.steps)
    return max(relative_error(a, b) for a, b in zip(got.steps, expected.steps, strict=True))


def texts(inputs: Any) -> tuple[Tensor, Tensor, int]:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    return ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1), inputs["completion_ids"].shape[1]


def k3(reference: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    return ((torch.exp(reference - logp) - (reference - logp) - 1) * mask).sum() / mask.sum()
