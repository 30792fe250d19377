"""The kernels by themselves: a weight's products, and resolving two gradients."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from pcr_torch import kernels
from pcr_torch.kernels import Layout


def products(bench: Bench) -> None:
    """A weight's two gradients with all products, in units of the two matrix products that they contain."""
    inputs, outputs, rows = (64, 96, 64) if bench.toy else (896, 4864, 16384)
    for tokens in (8, 16) if bench.toy else (128, 256, 512, 1024, 2048):
        n = max(4, rows // tokens)
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(n * tokens, inputs, device=bench.device, dtype=dtype)
            a, b = (torch.randn(n * tokens, outputs, device=bench.device, dtype=dtype) for _ in range(2))
            layout = Layout.even(n, tokens, [list(range(k, k + 4)) for k in range(0, n, 4)], bench.device)
            plain = bench.fastest(lambda: (a.T @ x, b.T @ x))  # noqa: B023
            row: dict[str, Any] = {}
            for way in ("triton", "plain torch"):
                if way == "plain torch" or kernels.chosen(bench.device) == "triton":
                    took = bench.fastest(lambda: kernels.weight_products(x, [a, b], layout, transposed=False, way=way))  # noqa: B023
                    row[way] = took / plain
            bench.add("weight products", tokens=tokens, dtype=str(dtype).removeprefix("torch."), **row)


def resolving(bench: Bench) -> None:
    """Products and weighted sums of two gradients, in copies of as many numbers."""
    shapes = [(64, 96)] * 4 if bench.toy else [(896, 4864)] * 92
    firsts, seconds = ([torch.randn(shape, device=bench.device) for shape in shapes] for _ in range(2))
    copy = bench.fastest(lambda: [first.copy_(second) for first, second in zip(firsts, seconds, strict=True)])
    weights = torch.ones(2, len(shapes), device=bench.device)

    def naive() -> None:
        for p, s in zip(firsts, seconds, strict=True):
            float((p * p).sum()), float((s * s).sum()), float((p * s).sum())
            p.copy_(p + s)

    def ours() -> None:
        kernels.pair_products(firsts, seconds).cpu()
        kernels.combine(firsts, firsts, seconds, weights, [False] * len(shapes))

    def one_at_a_time() -> None:
        for p, s in zip(firsts, seconds, strict=True):
            kernels.pair_products([p], [s])

    numbers = sum(first.numel() for first in firsts)
    for way, job in (("naive", naive), ("in few launches", ours)):
        bench.add("resolving", numbers=numbers, way=way, copies=bench.fastest(job) / copy)
    # three products read both once, which is what a copy reads and writes
    bench.add(
        "resolving", numbers=numbers, way="products, a matrix at a time", copies=bench.fastest(one_at_a_time) / copy
    )
