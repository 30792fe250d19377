"""A small model and batch out of the ordinary, and what it means that `PCR` is right on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from problems import Batch
from torch import Tensor, nn

import pcr_core
from pcr_core import Objective
from pcr_torch import PCR

RULE = pcr_core.PCR(alpha="snr", gate="probability")


BOTH = pytest.mark.parametrize("norms", ["fast", "loop"])


Rows = list[list[Tensor | None]]


class Output(NamedTuple):
    logits: Tensor


class Small(nn.Module):
    """Without attention: every token by itself, so that the layers can be anything."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(31, 8)
        self.layers = nn.ModuleList(layers or [nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 31)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.6)

    def forward(self, input_ids: Tensor) -> Output:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return Output(self.head(hidden))


def names_of(method: PCR) -> list[str]:
    return [name for block in method.blocks for name in block.parameters]


def contributions(
    model: nn.Module, names: list[str], logp: Tensor | list[Tensor], objective: Objective[Tensor]
) -> Iterator[Tensor]:
    """Per stream the (n, d) contributions of the responses, by plain autograd; logp may be a row a response."""
    leaves = [model.get_parameter(name) for name in names]
    for cotangent in (objective.plasticity_cotangent, objective.stability_cotangent):
        rows = []
        for i in range(len(logp)):
            row = logp[i]
            grads = torch.autograd.grad(
                row, leaves, grad_outputs=cotangent[i, : len(row)], retain_graph=True, allow_unused=True
            )
            rows.append(
                torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(leaves, grads)])
            )
        yield torch.stack(rows)


def assert_right(
    method: PCR, logp: Tensor, objective: Objective[Tensor], group_ids: Tensor, rows: Any = None, tol: float = 1e-4
) -> None:
    """Statistics and update of the method equal the dense method on plain autograd's contributions of `rows`."""
    model, names = method.model, names_of(method)
    streams = tuple(contributions(model, names, logp if rows is None else rows, objective))
    sizes = [sum(model.get_parameter(n).numel() for n in block.parameters) for block in method.blocks]
    dense = pcr_core.resolve(*streams, group_ids=group_ids, sizes=sizes, rule=method.rule)
    assert float(dense.update.norm()) > 0
    model.zero_grad()
    method.accumulate(logp, objective, group_ids=group_ids)
    report = method.resolve()
    got, expected = report.statistics, dense.statistics
    for name in ("plasticity_sq", "stability_sq", "plasticity_var", "stability_var"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name).double(), rtol=tol, atol=0.0)
    update = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
                        for p in map(model.get_parameter, names)])  # fmt: skip
    assert (update - dense.update).norm() <= tol * dense.update.norm()


def assert_batch_right(method: PCR, data: Batch, tol: float = 1e-4) -> None:
    logp = data.logp(method.model)
    assert_right(method, logp, data.objective(logp), data.group_ids, tol=tol)
    assert_right_without_noise(method, lambda: data.logp(method.model), data, tol)


def assert_right_without_noise(method: PCR, logp_of: Callable[[], Tensor], data: Batch, tol: float = 1e-4) -> None:
    """The same blocks, by automatic differentiation alone: sums of plain autograd's gradients, resolved densely."""
    model, names = method.model, names_of(method)
    leaves = [model.get_parameter(name) for name in names]
    rule = pcr_core.PCR(alpha=0.7)
    logp = logp_of()
    objective = data.objective(logp)
    cotangents = objective.plasticity_cotangent, objective.stability_cotangent
    streams = [torch.autograd.grad(logp, leaves, c, retain_graph=True, allow_unused=True) for c in cotangents]
    before = [(p, p.grad) for p in model.parameters()]
    model.zero_grad()
    plain = PCR(model, blocks=lambda name, _: name in names, rule=rule, noise_every=0)
    plain.accumulate(logp, objective, group_ids=data.group_ids)
    report = plain.resolve()
    assert report.path == "autograd"
    for name, leaf, p, s, a, b in zip(
        names, leaves, *streams, report.weights.plasticity.tolist(), report.weights.stability.tolist(), strict=True
    ):
        if p is None or s is None:
            assert leaf.grad is None, name
            continue
        c = float((p * s).double().sum())
        expected = 1 + (min(0.7 * -c / float((s * s).double().sum()), 10) if c < 0 else 0)
        assert a == 1, name
        assert b == pytest.approx(expected, rel=1e-3), name
        assert leaf.grad is not None, name
        assert (leaf.grad - (p + b * s)).norm() <= tol * leaf.grad.norm(), name
    for parameter, gradient in before:
        parameter.grad = gradient


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(8, 8), nn.Linear(8, 8)
        self.taken = True

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.yes(x) if self.taken else self.no(x)
        return out


class Routed(nn.Module):
    """Top-1 of three experts on the tokens sent to each; the last gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        scores = self.router(flat).softmax(-1)
        chosen = scores[:, :2].argmax(-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            at = (chosen == e).nonzero().flatten()
            if len(at):
                out = out.index_add(0, at, expert(flat[at]) * scores[at, e, None])
        return out.view_as(x)
