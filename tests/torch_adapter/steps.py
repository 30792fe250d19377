"""Steps of a model under `PCR`, for tests: its gradients, and accumulation of small batches."""

from __future__ import annotations

from typing import Any

from problems import Batch, batch
from torch import Tensor, nn

from pcr_torch import PCR


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(model: nn.Module, method: PCR, data: Batch, **options: object) -> Any:
    logp = data.logp(model)
    method.accumulate(logp, data.objective(logp, **options), group_ids=data.group_ids)
    return method.resolve()


def accumulate(model: nn.Module, method: PCR) -> None:
    data = batch()
    logp = data.logp(model)
    method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)


def gradients_of_a_step(model: nn.Module, method: PCR) -> dict[str, Tensor]:
    accumulate(model, method)
    method.resolve()
    found = gradients(model)
    model.zero_grad()
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= rtol * gradient.norm(), name
