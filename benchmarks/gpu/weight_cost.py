"""What do a weight's gradients with all their products cost, in the two matrix products that they contain?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.tables import Table
from benchmarks.gpu.timing import rates
from pcr_torch import kernels
from pcr_torch.kernels import Layout

_RESPONSES, _GROUP = 16, 4


def products(context: Context) -> Iterator[Table]:
    """A row for each length of the responses."""
    device = torch.device(context.device)
    inputs, outputs = (16, 24) if context.toy else (896, 4864)
    dtypes = (torch.bfloat16,) if context.toy else (torch.bfloat16, torch.float32)
    fused = kernels.chosen(device) == "triton"
    for dtype in dtypes:
        context.say(f"weight products: {str(dtype)[6:]}")
        columns = [
            "tokens a response",
            "two plain products, ms",
            "Triton, ms",
            "times",
            "TFLOP/s",
            "plain torch, ms",
            "times",
        ]
        title = f"Products of a weight of {inputs} x {outputs}, {str(dtype)[6:]}"
        title += f", {_RESPONSES} responses in groups of {_GROUP}"
        table = Table(title, columns)
        if not fused:
            table.notes.append(f"Triton's are left out: {kernels.chosen(device)}.")
        for tokens in (4, 8) if context.toy else (128, 256, 512, 1024, 2048):
            if context.left() < 1:
                table.notes.append(f"Cut, since the time was up: from {tokens} tokens on.")
                break
            x, a, b = (torch.randn(_RESPONSES * tokens, k, device=device).to(dtype) for k in (inputs, outputs, outputs))
            strata = [list(range(k, k + _GROUP)) for k in range(0, _RESPONSES, _GROUP)]
            layout = Layout.even(_RESPONSES, tokens, strata, device)
            jobs: dict[str, Callable[[], Any]] = {"two": partial(_two, x, a, b)}
            for way in ("triton", "plain torch") if fused else ("plain torch",):
                jobs[way] = partial(kernels.weight_products, x, [a, b], layout, transposed=False, way=way)
            found = rates(context, jobs, rounds=1 if context.toy else 7, calls=1 if context.toy else 3)
            took = {name: statistics.median(times) for name, times in found.items()}
            row: list[Any] = [tokens, 1e3 * took["two"]]
            row += [None] * 3 if not fused else [
                1e3 * took["triton"],
                took["triton"] / took["two"],
                4 * len(x) * inputs * outputs / took["triton"] / 1e12,
            ]  # fmt: skip
            table.rows.append([*row, 1e3 * took["plain torch"], took["plain torch"] / took["two"]])
        yield table


def _two(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return a.T @ x, b.T @ x
