"""Chains of operations on tokens, of which some keep rows apart and some do not, on sizes that may coincide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Step = Callable[["Program", Tensor], Tensor]


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)


APART: dict[str, Step] = {
    "tanh": lambda p, x: torch.tanh(x),
    "linear": lambda p, x: p.linear(x),
    "gated": lambda p, x: functional.silu(p.linear(x)) * p.linear(x),
    "plain linear": lambda p, x: functional.linear(x, p.matrix, p.vector),
    "made weight": lambda p, x: x * (1.0 + p.vector.exp()),
    "rms": lambda p, x: _norm(x),
    "layer norm": lambda p, x: functional.layer_norm(x, x.shape[-1:], p.vector),
    "softmax": lambda p, x: x.softmax(-1),
    "flat and back": lambda p, x: torch.tanh(x.reshape(-1, x.shape[-1])).view(x.shape) + x,
    "halves": lambda p, x: torch.cat([x[..., 1:], x[..., :1]], dim=-1),
    "of features": lambda p, x: x + x.mean(-1, keepdim=True),
    "itself": lambda p, x: x + x,
}
MIXING: dict[str, Step] = {
    "of tokens": lambda p, x: x + x.mean(1, keepdim=True),
    "of responses": lambda p, x: x + x.mean(0),
    "of all": lambda p, x: x + x.mean((0, 1)),
    "of everything": lambda p, x: x + x.mean(),
    "softmax over tokens": lambda p, x: x.softmax(1),
    "first token": lambda p, x: x + x[:, :1],
    "first tokens": lambda p, x: x * (x[:, 0] if x.shape[0] == x.shape[1] else x[:, :1]),
    "first response": lambda p, x: x * x[:1],
    "turned": lambda p, x: x + x.transpose(0, 1) if x.shape[0] == x.shape[1] else x.flip(0),
    "features turned": lambda p, x: x + x.mT if x.shape[1] == x.shape[2] else x.flip(1),
    "rolled": lambda p, x: x.roll(1, 1),
    "so far": lambda p, x: x.cumsum(1),
    "permuted": lambda p, x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "tokens selected": lambda p, x: x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1)),
    "regrouped": lambda p, x: _norm(x.reshape(x.shape[0], -1)).view(x.shape),
    "attention": lambda p, x: x + (x @ x.mT).softmax(-1) @ x,
    "tokens through a layer": lambda p, x: x + p.linear(x.mT).mT if x.shape[1] == x.shape[2] else x.flip(1),
    "layer norm of all": lambda p, x: functional.layer_norm(x, x.shape[1:]),
    "two slices": lambda p, x: torch.cat([x[:, 1:], x[:, :1]], dim=1),
    "weight from activations": lambda p, x: functional.linear(x, p.matrix * x.mean((0, 1))),
    "made positions": lambda p, x: x + torch.tanh(p.linear(p.matrix)) if x.shape[1] == x.shape[2] else x.flip(1),
    "made for a response": lambda p, x: x * p.linear(p.start[:, :1]),
    "made in parts": lambda p, x: (x[..., None] * p.linear(p.start)).sum(-1) if len({*x.shape}) == 1 else x.flip(0),
    "a number from a function": lambda p, x: x + checkpoint(p.layers[-1], 2.0 * p.start, use_reentrant=True).mean(),
    "misnamed": lambda p, x: Mul.apply(x),  # type: ignore[no-untyped-call]
    "scaled by all": lambda p, x: p.start * x.mean(),
}


class Mul(torch.autograd.Function):
    """Named as an operation that it is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0].flip(1)


class Leafy(torch.autograd.Function):
    """With what tells autograd's leaves from other nodes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = x
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return 2.0 * grad_outputs[0]


EITHER: dict[str, Step] = {  # by the sizes, or with more care than is taken
    "like a leaf": lambda p, x: Leafy.apply(x),  # type: ignore[no-untyped-call]
    "misread": lambda p, x: _norm(x.reshape(x.shape[::-1])).reshape(x.shape),
    "renamed": lambda p, x: torch.tanh(x.reshape(x.shape[1], x.shape[0], -1)).reshape(x.shape),
}
ENDS: dict[str, Step] = {
    "sum": lambda p, x: x.sum(-1),
    "gather": lambda p, x: x.log_softmax(-1).gather(-1, torch.ones_like(x[..., :1], dtype=torch.int64)).squeeze(-1),
    "later": lambda p, x: x[:, 1:].sum(-1),
    "every other": lambda p, x: p.linear(x)[:, ::2].logsumexp(-1),
    "flat": lambda p, x: x.flatten(0, 1).sum(-1).view(x.shape[:2]),
    "over tokens": lambda p, x: x.sum(1),
    "over responses": lambda p, x: x.sum(0),
    "features": lambda p, x: p.linear(x)[:, 0],
    "masked": lambda p, x: torch.zeros(p.mask.shape).masked_scatter(p.mask, p.linear(x[p.mask]).sum(-1)),
    "filled": lambda p, x: x.sum(-1).masked_fill(p.mask, 0.0),
    "open slice": lambda p, x: torch.ops.aten.slice.Tensor(x, 1, None, None).sum(-1),
    "scattered onto one row": lambda p, x: x[:1, :, 0].masked_scatter(p.mask, x[p.mask].sum(-1)),
    "reordered": lambda p, x: p.linear(x)[torch.arange(-1, -x.shape[0] - 1, -1)].sum(-1),
    "selected": lambda p, x: p.linear(x).sum(-1).index_select(0, torch.arange(x.shape[0] - 1, -1, -1)),
    "put back": lambda p, x: torch.zeros(x.shape[:2]).index_put(
        (torch.arange(-1, -x.shape[0] - 1, -1),), p.linear(x).sum(-1)
    ),
    "put on one": lambda p, x: torch.zeros(x.shape[:2]).index_put(
        (torch.zeros(x.shape[0], dtype=torch.int64),), p.linear(x).sum(-1)
    ),
    "spread": lambda p, x: torch.zeros(x.shape[:2]).index_put((torch.arange(x.shape[0]),), p.linear(x[:1]).sum(-1)),
    "added onto one": lambda p, x: torch.zeros(x.shape[:2]).index_put(
        (torch.zeros(x.shape[0], dtype=torch.int64),), p.linear(x).sum(-1), accumulate=True
    ),
    "first twice": lambda p, x: p.linear(x)[torch.tensor([*range(x.shape[0]), -x.shape[0]])].sum(-1),
    "chosen twice": lambda p, x: x.flatten(0, 1)[torch.zeros(x[..., 0].numel(), dtype=torch.int64)].sum(-1)[None],
    "through layers": lambda p, x: p.linear(torch.tanh(p.linear(torch.tanh(x.sum(1))))),
}


class Program(nn.Module):
    """A chain of steps with skip connections, on sizes that may coincide."""

    def __init__(self, shape: tuple[int, int, int], steps: list[tuple[Step, bool]], end: Step) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        n, tokens, width = shape
        self.start = nn.Parameter(torch.randn(shape, generator=generator))
        self.matrix = nn.Parameter(torch.randn(width, width, generator=generator))
        self.vector = nn.Parameter(torch.randn(width, generator=generator))
        self.mask = torch.rand(n, tokens, generator=generator) > 0.4
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=k % 2 == 0) for k in range(32))
        self.steps, self.end = steps, end

    def linear(self, x: Tensor) -> Tensor:
        self.used += 1
        out: Tensor = self.layers[self.used](x)
        return out

    def forward(self) -> Tensor:
        self.used = -1
        x = self.start * 1.0
        for step, skip in self.steps:
            x = x + step(self, x) if skip else step(self, x)
        return self.end(self, x)


def program(shape: tuple[int, int, int], names: list[tuple[str, bool]], end: str) -> Program:
    return Program(shape, [({**APART, **MIXING, **EITHER}[name], skip) for name, skip in names], ENDS[end])
