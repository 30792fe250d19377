"""Layers of any rows, and the products of their gradients by definition, for tests of `pcr_torch.kernels`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pcr_torch.kernels import (
    Layout,
    plain,
    weight_products,
)
from pcr_torch.products import Products
from pcr_torch.pullback import PAIRS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


RUNS = find_spec("triton") is not None and (DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


triton_only = pytest.mark.skipif(not RUNS, reason="needs triton, and a GPU or TRITON_INTERPRET=1 (make kernels)")


WAYS = [pytest.param("triton", marks=triton_only), "plain torch", "token Grams"]


# owners of rows: two unequal groups of equal responses; a packed row with padding and an empty response; rows mixed
EVEN = ([i for i in range(5) for _ in range(7)], [[0, 3], [2, 1, 4]])


PACKED = ([2, 2, 2, 0, 0, -1, *[3] * 70, -1], [[0, 1], [3, 2]])


MIXED = ([1, 0, 2, 2, 0, 1, 1, -1, 0, 2, 3], [[0], [1, 2, 3]])


def problem(
    owners: Sequence[int], inputs: int, outputs: int, streams: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(len(owners) + 7 * inputs + outputs)
    x, *dys = (torch.randn(len(owners), k, generator=generator) for k in (inputs, *[outputs] * streams))
    return x.to(dtype).to(DEVICE), [dy.to(dtype).to(DEVICE) for dy in dys]


def products(way: str, x: Tensor, dys: list[Tensor], layout: Layout, *, transposed: bool, **options: Any) -> Products:
    if way == "triton":
        return weight_products(x, dys, layout, transposed=transposed, way=way, **options)
    totals, found = plain.weight_products(
        x, dys, layout, transposed=transposed, by_gram=way == "token Grams", **options
    )
    return Products(totals, found[:, : layout.responses], found[:, layout.responses :])


def by_definition(
    x: Tensor, dys: Sequence[Tensor], owners: Any, strata: Sequence[Sequence[int]], *, transposed: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Totals; per-response and per-stratum gradients (n, d) of each stream, in float64."""
    owners, n = np.asarray(owners), sum(map(len, strata))
    parts = []
    for dy in dys:
        of = [np.flatnonzero(owners == i) for i in range(n)]
        whole = [dy[rows].double().cpu().T @ x[rows].double().cpu() for rows in of]
        parts.append(torch.stack([g.T if transposed else g for g in whole]))
    sums = [torch.stack([part[list(rows)].sum(0) for rows in strata]) for part in parts]
    return [s.sum(0) for s in sums], [p.flatten(1) for p in parts], [s.flatten(1) for s in sums]


def assert_right(got: Products, expected: tuple[list[Tensor], list[Tensor], list[Tensor]], tolerance: float) -> None:
    totals, responses, sums = expected
    for found, parts in ((got.response, responses), (got.stratum, sums)):
        for pair, (a, b) in enumerate(PAIRS[len(totals)]):
            scale = parts[a].norm(dim=1) * parts[b].norm(dim=1)
            error = (found[pair].cpu() - (parts[a] * parts[b]).sum(1)).abs()
            assert bool((error <= tolerance * scale).all()), (pair, error / scale)
    for total, sought in zip(got.totals, totals, strict=True):
        assert total.shape == sought.shape
        assert (total.cpu() - sought).abs().max() <= tolerance * sought.abs().max()
