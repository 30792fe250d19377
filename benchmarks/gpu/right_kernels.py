"""Are the kernels right on this device? Triton's and the plain path, each against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.gpu.tables import Table
from pcr_torch import kernels
from pcr_torch.kernels import Layout
from pcr_torch.pullback import PAIRS

BOUND = 2e-5
# rows, inputs, outputs that no tile divides, and that all do
SHAPES = {"even": (8 * 128, 256, 512), "lengths that differ": (700, 261, 523), "mixed rows": (700, 384, 392)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def products(context: Context) -> Iterator[Table]:
    """Weight products, then resolving."""
    device = torch.device(context.device)
    table = Table(
        "Right? Largest relative errors of the kernels against float64",
        ["of", "Triton", "plain torch", "bound", "right"],
    )
    ways = ["triton", "plain torch"]
    if kernels.chosen(device) != "triton":
        ways = ["plain torch"]
        table.notes.append(f"Triton's are left out: {kernels.chosen(device)}.")
    generator = torch.Generator(device).manual_seed(context.seed)
    for dtype in DTYPES:
        if dtype == torch.float16 and context.device == "cpu":
            continue
        for name in SHAPES:
            for transposed in (False, True):
                for streams in (2, 1):
                    if context.left() < 2:
                        table.notes.append("Cut, since the time was up: the last of these.")
                        yield table
                        return
                    problem = _problem(name, dtype, streams, device, generator, toy=context.toy)
                    what = f"weight products, {name}, {str(dtype)[6:]}, {streams} stream{'s' * (streams > 1)}"
                    what += ", stored (in, out)" * transposed
                    _add(table, what, {way: _weights(*problem, transposed, way) for way in ways})
        context.say(f"right? weight products in {str(dtype)[6:]}")
    for dtype in (torch.float32, torch.bfloat16):
        sizes = (3, 4097, 70_001) if context.toy else (3, 4097, 5_000_011)
        p, s = ([torch.randn(k, generator=generator, device=device).to(dtype) for k in sizes] for _ in range(2))
        # which of the two ways it is, is the device's
        way = ways[0]
        _add(table, f"|P|^2, |S|^2, P.S of three sizes, {str(dtype)[6:]}", {way: _pairs(p, s)})
        _add(
            table,
            f"a P + b S of three sizes, {str(dtype)[6:]}",
            {way: _sums(p, s)},
            1e-6 if dtype.itemsize > 2 else 8e-3,
        )
    yield table


def _add(table: Table, what: str, errors: dict[str, Callable[[], float]], bound: float = BOUND) -> None:
    found: dict[str, Any] = {}
    right = True
    for way, error in errors.items():
        try:
            found[way] = error()
            right &= found[way] <= bound
        except Exception as failed:
            found[way], right = f"{type(failed).__name__}: {failed}".splitlines()[0][:150], False
    table.rows.append([what, found.get("triton"), found.get("plain torch"), bound, right])
    table.wrong |= not right


def _problem(
    name: str, dtype: torch.dtype, streams: int, device: torch.device, generator: torch.Generator, *, toy: bool
) -> tuple[Tensor, list[Tensor], Layout, list[Tensor]]:
    """Activations, output gradients, layout, and the rows of each response."""
    rows, inputs, outputs = (k // (8 if toy else 1) for k in SHAPES[name])
    x = torch.randn(rows, inputs, generator=generator, device=device).to(dtype)
    dys = [torch.randn(rows, outputs, generator=generator, device=device).to(dtype) for _ in range(streams)]
    if streams == 2:
        dys[1] = (0.3 * dys[1] - 0.2 * dys[0]).to(dtype)
    strata = [[0, 1, 2], [3, 4], [5, 6, 7]]
    if name == "even":
        owners = np.repeat(np.arange(8), rows // 8)
        layout = Layout.even(8, rows // 8, strata, device)
    else:
        owners = np.random.default_rng(0).integers(-1, 8, rows)
        owners = owners if name == "mixed rows" else np.sort(owners)
        layout = Layout.owned(owners, 8, strata, device)
    return x, dys, layout, [torch.from_numpy(np.flatnonzero(owners == i)).to(device) for i in range(8)]


def _weights(
    x: Tensor, dys: list[Tensor], layout: Layout, rows: Sequence[Tensor], transposed: bool, way: str
) -> Callable[[], float]:
    def error() -> float:
        found = kernels.weight_products(x, dys, layout, transposed=transposed, way=way)
        wide, gradients = x.double(), [dy.double() for dy in dys]
        of_one = [torch.stack([dy[at].T @ wide[at] for at in rows]) for dy in gradients]
        of_stratum = [torch.stack([one[members].sum(0) for members in layout.strata]) for one in of_one]
        errors = []
        for pair, (a, b) in enumerate(PAIRS[len(dys)]):
            for mine, true in ((found.response, of_one), (found.stratum, of_stratum)):
                exact = (true[a] * true[b]).sum((1, 2))
                scale = (true[a].square().sum((1, 2)) * true[b].square().sum((1, 2))).sqrt()
                errors.append(((mine[pair] - exact).abs() / scale).max())
        for total, one in zip(found.totals, of_one, strict=True):
            exact = one.sum(0).T if transposed else one.sum(0)
            errors.append((total.double() - exact).norm() / exact.norm())
        return _largest(errors)

    return error


def _pairs(p: list[Tensor], s: list[Tensor]) -> Callable[[], float]:
    def error() -> float:
        found = kernels.pair_products(p, s).cpu()
        errors = []
        for mine, one, other in zip(found, p, s, strict=True):
            u, v = one.double(), other.double()
            pp, ss, ps = (float(t) for t in (u.square().sum(), v.square().sum(), (u * v).sum()))
            scale = torch.tensor([pp, ss, math.sqrt(pp * ss)], dtype=torch.float64)
            errors.append(((mine - torch.tensor([pp, ss, ps], dtype=torch.float64)).abs() / scale).max())
        return _largest(errors)

    return error


def _sums(p: list[Tensor], s: list[Tensor]) -> Callable[[], float]:
    def error() -> float:
        weights = torch.tensor([[1.0, 0.5, 1.0], [1.7, 2.0, 0.0]], device=p[0].device)
        outs = [t.clone() for t in p]
        adds = [False, True, False]
        broken = kernels.combine(outs, p, s, weights, adds)
        errors = [broken.any().double()]
        for out, one, other, a, b, add in zip(outs, p, s, *weights.double().cpu(), adds, strict=True):
            exact = float(a) * one.double() + float(b) * other.double() + (one.double() if add else 0)
            errors.append((out.double() - exact).norm() / exact.norm())
        return _largest(errors)

    return error


def _largest(errors: list[Tensor]) -> float:
    return float(torch.stack([e.double().cpu() for e in errors]).nan_to_num(nan=float("inf")).max())
