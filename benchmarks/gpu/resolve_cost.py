"""What does it cost to resolve two gradients, in copies of the device's memory?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import pcr_core
from benchmarks.gpu.context import Context
from benchmarks.gpu.tables import Table
from benchmarks.gpu.timing import rates
from pcr_core import BlockStatistics
from pcr_torch import kernels
from pcr_torch.combine import all_products
from pcr_torch.update import Part, add_update

_ONE, _MATRICES = 400_000_000, (72, (896, 4864))
_HELD = 8  # vectors of that length that the naive loop has at once, with room


def resolving(context: Context) -> Iterator[Table]:
    """One long block, then many matrices."""
    yield _one_block(context)
    if context.device == "cuda":
        torch.cuda.empty_cache()
    yield _matrices(context)


def _one_block(context: Context) -> Table:
    numbers = 100_000 if context.toy else min(_ONE, context.free() // (4 * _HELD))
    context.say(f"resolving {numbers:,} numbers")
    p, s = _gradients(numbers, context)
    parameter = nn.Parameter(torch.empty_like(p))
    target = torch.empty_like(p)

    def pcr() -> None:
        parameter.grad = None
        pp, ss, ps = all_products([p], [s])[0][:, None]
        none = torch.zeros_like(pp)
        weights = pcr_core.PCR()(BlockStatistics(pp, ss, ps, none, none, none, none + numbers))
        a, b = weights.plasticity.item(), weights.stability.item()
        add_update([Part(parameter, p, s, a, b, 1e30)])

    def naive() -> None:
        """The common implementation of PCGrad for two tasks."""
        mine, other = p.clone(), s.clone()
        for one, against in ((mine, s), (other, p)):
            dot = torch.dot(one, against)
            if dot < 0:
                one -= dot * against / (against.norm() ** 2)
        parameter.grad = torch.stack([mine, other]).sum(dim=0)

    jobs: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(p),
        "PCR": pcr,
        "PCGrad, the common loop": naive,
    }
    return _table(context, f"Resolving one block of {numbers:.0e} float32 numbers", jobs, numbers, {})


def _matrices(context: Context) -> Table:
    many, shape = (6, (8, 12)) if context.toy else _MATRICES
    context.say(f"resolving {many} matrices of {shape[0]} x {shape[1]}")
    firsts, seconds, targets = ([t.view(shape) for t in _gradients(many * shape[0] * shape[1], context)[k].chunk(many)]
                                for k in (0, 1, 0))  # fmt: skip
    weights = torch.tensor([[1.0], [1.0]], device=context.device).expand(2, many).contiguous()
    device = torch.device(context.device)

    def products_by_one() -> list[Tensor]:
        return [kernels.pair_products([p], [s]) for p, s in zip(firsts, seconds, strict=True)]

    def sums_by_one() -> None:
        for k in range(many):
            kernels.combine([targets[k]], [firsts[k]], [seconds[k]], weights[:, :1].contiguous(), [False])

    jobs: dict[str, Callable[[], object]] = {
        "copy": lambda: torch._foreach_copy_(targets, firsts),
        "products, one at a time": products_by_one,
        "products, together": lambda: kernels.pair_products(firsts, seconds),
        "a P + b S, one at a time": sums_by_one,
        "a P + b S, together": lambda: kernels.combine(targets, firsts, seconds, weights, [False] * many),
    }
    # numbers read and written for each of a gradient
    moved = {name: 3 if "a P" in name else 2 for name in jobs}
    title = f"Resolving {many} matrices of {shape[0]} x {shape[1]}, float32, by {kernels.chosen(device)}"
    return _table(context, title, jobs, many * shape[0] * shape[1], moved)


def _gradients(numbers: int, context: Context) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(context.device).manual_seed(context.seed)
    p, noise = (torch.randn(numbers, generator=generator, device=context.device) for _ in range(2))
    return p, noise.sub_(p, alpha=0.1).mul_(1 / 30)


def _table(
    context: Context, title: str, jobs: dict[str, Callable[[], object]], numbers: int, moved: dict[str, int]
) -> Table:
    columns = ["way", "ms", "copies", "GB/s", *(["part of copy bandwidth"] if moved else [])]
    table = Table(title, columns)
    calls = 1 if context.toy else 5 if moved else 2
    found = rates(context, jobs, rounds=1 if context.toy else 9, calls=calls)
    copy = statistics.median(found["copy"])
    for name, times in found.items():
        took = statistics.median(times)
        row: list[Any] = [name, 1e3 * took, took / copy]
        per_number = moved.get(name, 2 if name == "copy" else 0)
        row.append(4 * per_number * numbers / took / 1e9 if per_number else None)
        table.rows.append([*row, per_number / 2 * copy / took] if moved else row)
    return table
