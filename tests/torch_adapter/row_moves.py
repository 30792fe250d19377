"""Random chains of operations that move rows, mix them or keep them apart, on sizes that may coincide."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pcr_torch.probe import install

Step = Callable[["Chain", Tensor], Tensor]


class Watch:
    """A receiver that keeps what comes to each layer."""

    def __init__(self) -> None:
        self.dys: dict[str, Tensor] = {}

    def arrived(
        self, node: Any, x: Tensor | None, weight: Tensor, dy: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        self.dys[node.path] = self.dys.get(node.path, 0) + dy
        return dy @ weight, torch.zeros_like(weight), None


class Chain:
    """Steps applied one after the other, with layers between them that are watched; `output` is (n, T)."""

    def __init__(self, seed: int, steps: list[str], end: str = "") -> None:
        self.chance = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.watch, self.layers = Watch(), 0
        shape = [self.chance.choice((2, 3, 3, 4)), *self.chance.choices((1, 2, 3, 3, 4), k=2)]
        x = self.linear(self.random(*shape).requires_grad_() * 1.0)
        self.before = [x]
        for name in steps:
            y = STEPS[name](self, x)
            if y.ndim and 0 < y.numel() < 2000 and y.requires_grad:
                x = self.linear(y) if self.chance.random() < 0.4 else y
                self.before.append(x)
        x = x[:, None] if x.ndim == 1 else x
        while x.ndim > 2:
            x = x.sum(self.chance.choice((-1, -1, 0, 1)))
        self.output = x.t() if end == "turned" else x

    def linear(self, x: Tensor) -> Tensor:
        layer = nn.Linear(x.shape[-1], x.shape[-1])
        with torch.no_grad():
            layer.weight.copy_(self.random(*layer.weight.shape))
        install(layer, self.watch, str(self.layers))
        self.layers += 1
        out: Tensor = layer(x)
        return out

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def other(self, x: Tensor) -> Tensor:
        """Of the same shape: nothing, the same, an earlier one, or another layer's."""
        earlier = [y for y in self.before if y.shape == x.shape] or [x]
        choices = (torch.zeros_like, torch.tanh, lambda x: self.chance.choice(earlier) * 2.0, self.linear)
        y: Tensor = self.chance.choice(choices)(x)
        return y

    def dim(self, x: Tensor) -> int:
        return self.chance.randrange(x.ndim)

    def some(self, size: int, count: int = 0) -> Tensor:
        """Indices, some of them twice, some from the end."""
        count = count or self.chance.randint(1, 4)
        return torch.tensor([self.chance.randrange(-size, size) for _ in range(count)])

    def order(self, size: int) -> Tensor:
        return torch.tensor(self.chance.sample(range(size), size))

    def indices(self, x: Tensor, dim: int) -> Tensor:
        """Of `gather` and `scatter`."""
        return torch.randint(x.shape[dim], x.shape, generator=self.generator)

    def mask(self, x: Tensor) -> Tensor:
        """Of leading dimensions."""
        mask = torch.rand(x.shape[: self.chance.randint(1, x.ndim)], generator=self.generator) > 0.4
        mask.view(-1)[0] = True
        return mask


def _at(dim: int, what: Any) -> tuple[Any, ...]:
    return (slice(None),) * dim + (what,)


def _written(c: Chain, x: Tensor, to: Any, what: Tensor) -> Tensor:
    y = c.other(x) * 1.0
    y[to] = what
    return y


def _shifted_in_place(c: Chain, x: Tensor, d: int) -> Tensor:
    return _written(c, x, _at(d, slice(1, None)), torch.tanh(x)[_at(d, slice(None, -1))])


def _added_to_a_view(c: Chain, x: Tensor) -> Tensor:
    y, d = x * 1.0, c.dim(x)
    y.select(d, 0).add_(torch.tanh(x).select(d, -1))
    return y


def _turned_in_place(c: Chain, x: Tensor) -> Tensor:
    y = x * 1.0
    y.mT[..., 0, :] = torch.tanh(x).mT[..., -1, :] * 2.0
    return y


def _experts(c: Chain, x: Tensor) -> Tensor:
    """Tokens sent to experts and added back by their weight, as in a mixture of experts."""
    flat = x.reshape(-1, x.shape[-1])
    choice = torch.randint(3, (len(flat), 2), generator=c.generator)
    weights, out = c.linear(flat).softmax(-1), torch.zeros_like(flat)
    for expert in range(3):
        token, slot = torch.where(choice == expert)
        y = torch.tanh(c.linear(flat[token])) * weights[token, slot % flat.shape[1], None]
        way = c.chance.randrange(3)
        if way == 0:
            out = out.index_add(0, token, y)
        elif way == 1:
            out = out.index_put((token,), y, accumulate=True)
        else:
            out = out.scatter_add(0, token[:, None].expand_as(y), y)
    return out.view(x.shape)


def _experts_in_order(c: Chain, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    order = c.order(len(flat))
    parts = [torch.tanh(c.linear(part)) for part in flat[order].chunk(2)]
    return torch.cat(parts)[order.argsort()].view(x.shape)


def _experts_side_by_side(c: Chain, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    out = torch.tanh(torch.bmm(flat.unsqueeze(0).repeat(3, 1, 1), c.random(3, *[x.shape[-1]] * 2)))
    return (out * torch.rand(3, len(flat), 1, generator=c.generator)).sum(0).view(x.shape)


def _attention(c: Chain, x: Tensor) -> Tensor:
    y = x if x.ndim > 3 else x.unsqueeze(-3)
    return functional.scaled_dot_product_attention(y, y, y, is_causal=c.chance.random() < 0.5).reshape(x.shape)


def _factored(c: Chain, x: Tensor) -> Tensor:
    d = c.dim(x)
    return x.unflatten(d, (c.chance.choice([k for k in range(1, x.shape[d] + 1) if x.shape[d] % k == 0]), -1))


def _regrouped(c: Chain, x: Tensor) -> Tensor:
    shape = [1, x.numel()]
    for k in range(2, x.numel()):
        shape = [k, x.numel() // k] if x.numel() % k == 0 and c.chance.random() < 0.5 else shape
    return x.reshape(shape)


STEPS: dict[str, Step] = {
    "linear": lambda c, x: torch.tanh(c.linear(x)),
    "checkpointed": lambda c, x: checkpoint(lambda y: torch.tanh(c.linear(y)), x, use_reentrant=False),
    "factored": _factored,
    "regrouped": _regrouped,
    "merged": lambda c, x: x.flatten(max(0, x.ndim - 3), max(0, x.ndim - 2)),
    "permuted": lambda c, x: x.permute(c.order(x.ndim).tolist()),
    "time first": lambda c, x: x.transpose(0, min(1, x.ndim - 1)),
    "matrix turned": lambda c, x: x.flatten(1).t() if x.ndim > 1 else x,
    "so far": lambda c, x: x.cumsum(c.dim(x)),
    "largest so far": lambda c, x: x.cummax(c.dim(x))[0],
    "flipped": lambda c, x: x.flip(c.dim(x)),
    "rolled": lambda c, x: x.roll(c.chance.choice((1, -1)), c.dim(x)),
    "rolled as one": lambda c, x: x.roll(1),
    "sorted": lambda c, x: x.sort(c.dim(x))[0],
    "softmax": lambda c, x: x.softmax(c.dim(x)),
    "less its mean": lambda c, x: x - x.mean(c.dim(x), keepdim=True),
    "sum": lambda c, x: x.sum(c.dim(x), keepdim=c.chance.random() < 0.5) if x.ndim > 1 else x,
    "largest": lambda c, x: x.amax(c.dim(x), keepdim=c.chance.random() < 0.5) if x.ndim > 1 else x,
    "logsumexp": lambda c, x: x.logsumexp(c.dim(x), keepdim=c.chance.random() < 0.5) if x.ndim > 1 else x,
    "length": lambda c, x: torch.linalg.vector_norm(x, dim=c.dim(x), keepdim=c.chance.random() < 0.5),
    "top": lambda c, x: x.topk(1, d := c.dim(x))[0].expand_as(x) + x.flip(d),
    "one of them": lambda c, x: x.select(c.dim(x), -1) if x.ndim > 2 else x,
    "some": lambda c, x: x[_at(d := c.dim(x), c.some(x.shape[d]))],
    "others": lambda c, x: x.index_select(d := c.dim(x), c.order(x.shape[d])),
    "pairs": lambda c, x: x[c.some(x.shape[0], 3), c.some(x.shape[1], 3)] if x.ndim > 1 else x,
    "pairs apart": lambda c, x: x[:, c.some(x.shape[1], 3), :, c.some(x.shape[3], 3)] if x.ndim > 3 else x,
    "where": lambda c, x: x[c.mask(x)],
    "sliced": lambda c, x: x[_at(c.dim(x), slice(c.chance.choice((0, 0, -2)), None, c.chance.choice((1, 2))))],
    "gathered": lambda c, x: x.gather(d := c.dim(x), c.indices(x, d)),
    "taken": lambda c, x: x.take(torch.randint(x.numel(), (2, 3), generator=c.generator)),
    "scattered": lambda c, x: c.other(x).scatter(d := c.dim(x), c.indices(x, d), x),
    "scattered and added": lambda c, x: c.other(x).scatter_add(d := c.dim(x), c.indices(x, d), x),
    "added at": lambda c, x: c.other(x).index_add(d := c.dim(x), c.some(x.shape[d], x.shape[d]) % x.shape[d], x),
    "copied to": lambda c, x: c.other(x).index_copy(d := c.dim(x), c.order(x.shape[d]), x),
    "put": lambda c, x: c.other(x).index_put((c.order(x.shape[0]),), x),
    "put on others": lambda c, x: c.other(x).index_put((c.some(x.shape[0], x.shape[0]),), x, accumulate=True),
    "put where": lambda c, x: c.other(x).index_put((m := c.mask(x),), x[m]),
    "put everywhere": lambda c, x: c.other(x).index_put((c.mask(x),), x.sum()),
    "mask scattered": lambda c, x: c.other(x).masked_scatter(
        (m := c.mask(x)).view(*m.shape, *[1] * (x.ndim - m.ndim)), x
    ),
    "either": lambda c, x: torch.where((m := c.mask(x)).view(*m.shape, *[1] * (x.ndim - m.ndim)), x, c.other(x)),
    "filled": lambda c, x: x.index_fill(d := c.dim(x), c.order(x.shape[d])[:1], 0.0),
    "joined": lambda c, x: torch.cat([x, c.other(x)], c.dim(x)),
    "stacked": lambda c, x: torch.stack([x, c.other(x)], c.dim(x)) if x.ndim < 4 else x,
    "parts in another order": lambda c, x: torch.cat([*reversed(x.split(1, d := c.dim(x)))], d),
    "apart and together": lambda c, x: torch.stack(x.unbind(c.dim(x)), c.chance.randrange(x.ndim)) if x.ndim > 1 else x,
    "wider": lambda c, x: x.unsqueeze(d := c.dim(x)).repeat_interleave(2, d) if x.ndim < 4 else x,
    "repeated": lambda c, x: x.repeat(*[1] * (d := c.dim(x)), 2, *[1] * (x.ndim - d - 1)),
    "each twice": lambda c, x: x.repeat_interleave(2, c.dim(x)),
    "padded": lambda c, x: functional.pad(x, (*[0] * (2 * c.dim(x)), 1, 0)),
    "shifted": lambda c, x: functional.pad(x, (*[0] * (2 * c.dim(x)), 1, -1)),
    "written": lambda c, x: _written(
        c, x, _at(d := c.dim(x), c.chance.randrange(x.shape[d])), torch.tanh(x).select(d, 0)
    ),
    "written to some": lambda c, x: _written(c, x, (i := c.order(x.shape[0])[:2],), torch.tanh(x)[i.flip(0)]),
    "written where": lambda c, x: _written(c, x, (m := c.mask(x),), torch.tanh(x)[m]),
    "written all over": lambda c, x: _written(c, x, (0,), torch.tanh(x)[-1, 0]) if x.ndim > 1 else x,
    "shifted in place": lambda c, x: _shifted_in_place(c, x, c.dim(x)),
    "turned in place": lambda c, x: _turned_in_place(c, x) if x.ndim > 1 else x,
    "added to a view": _added_to_a_view,
    "a view scaled": lambda c, x: (y := (x * 1.0).contiguous(), y.view(-1)[::2].mul_(2.0))[0],
    "select scattered": lambda c, x: c.other(x).select_scatter(torch.tanh(x).select(d := c.dim(x), 0), d, -1),
    "diagonal": lambda c, x: x.diagonal(0, 0, 1).movedim(-1, 0) if x.ndim > 1 else x,
    "windows": lambda c, x: x.unfold(d := c.dim(x), min(2, x.shape[d]), 1) if x.ndim < 4 else x,
    "strided": lambda c, x: torch.as_strided(y := (x * 1.0).contiguous(), y.shape[::-1], y.stride()[::-1]),
    "lower": lambda c, x: x.tril() if x.ndim > 1 else x,
    "by hand": lambda c, x: (x @ x.mT).softmax(-1) @ x if x.ndim > 1 else x,
    "attention": lambda c, x: _attention(c, x) if x.ndim > 1 else x,
    "rows mixed": lambda c, x: c.random(x.shape[-2], x.shape[-2]) @ x if x.ndim > 1 else x,
    "over the first": lambda c, x: torch.einsum("a...,ab->b...", x, c.random(x.shape[0], x.shape[0])),
    "cross-entropy": lambda c, x: (
        functional.cross_entropy(
            x.flatten(0, -2), torch.zeros(x[..., 0].numel(), dtype=torch.int64), reduction="none"
        ).view(x.shape[:-1])
        if x.ndim > 1
        else x
    ),
    "cross-entropy of tokens": lambda c, x: (
        functional.cross_entropy(x.movedim(-1, 1), torch.zeros(x.shape[:-1], dtype=torch.int64), reduction="none")
        if x.ndim > 2
        else x
    ),
    "first for all": lambda c, x: x + torch.tanh(x[:1]),
    "last for all": lambda c, x: x + torch.tanh(x[-1]),
    "layer norm": lambda c, x: functional.layer_norm(x, x.shape[-c.chance.randint(1, x.ndim) :]),
    "experts": _experts,
    "experts in order": _experts_in_order,
    "experts side by side": _experts_side_by_side,
}
