"""Inner products and combinations of totals on an accelerator, against their definition in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_problems import DEVICE, WAYS
from torch import Tensor

from pcr_torch import kernels, update
from pcr_torch.kernels import (
    combine,
    pair_products,
    pairs,
)
from pcr_torch.update import Part, add_update

SIZES = [1, 100, 2048, 40_000, 70_001]


@pytest.fixture(params=[WAYS[0], "plain torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Chosen for totals."""
    monkeypatch.setattr(pairs, "chosen", lambda _: request.param)
    return str(request.param)


def totals(dtype: torch.dtype, exponent: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(exponent)
    return [(10.0**exponent * torch.randn(k, generator=generator).double()).to(dtype).to(DEVICE) for k in SIZES]


@pytest.mark.parametrize("exponent", [-25, 0, 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("joined", [None, 0, 1])
@pytest.mark.usefixtures("way")
def test_products_of_totals(exponent: int, dtype: torch.dtype, joined: int | None) -> None:
    ps, ss = totals(dtype, exponent), totals(torch.float32, 1)
    found = pair_products(ps, ss, joined=joined).cpu()
    for products, p, s in zip(found, ps, ss, strict=True):
        p, s = p.double().cpu(), s.double().cpu()
        p, s = (p - s if joined == 0 else p), (s - p if joined == 1 else s)
        size = torch.stack([p @ p, s @ s, p.norm() * s.norm()])
        assert bool(((products - torch.stack([p @ p, s @ s, p @ s])).abs() <= 2e-7 * size).all())


@pytest.mark.usefixtures("way")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_products_of_totals_of_many_kinds_at_once() -> None:
    wide = torch.randn(30, 40, device=DEVICE)
    kinds = [wide, wide.T, wide[:, ::2], wide.bfloat16(), wide.double(), wide[0, 1:8], wide[:0]]
    found = pair_products(kinds, [2 * t for t in kinds]).cpu()
    expected = torch.stack([t.double().square().sum().cpu() for t in kinds])
    torch.testing.assert_close(found, torch.stack([expected, 4 * expected, 2 * expected], dim=1), rtol=1e-6, atol=0.0)
    broken = wide.clone()
    broken[3, 4] = torch.nan
    assert pair_products([wide, broken], [wide, wide]).isfinite().tolist() == [[True] * 3, [False, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.usefixtures("way")
def test_totals_are_combined_in_place(dtype: torch.dtype, add: bool) -> None:
    ps, ss = totals(torch.float32, 0), totals(torch.float32, 1)
    a, b = (torch.linspace(*ends, len(SIZES), device=DEVICE) for ends in ((1.0, 0.5), (2.0, -1.0)))
    there = totals(dtype, 2)
    outs = ps if dtype == torch.float32 and not add else [t.clone() for t in there]
    sought = [x * p.double() + y * s.double() for p, s, x, y in zip(ps, ss, a, b, strict=True)]
    broken = combine(outs, ps, ss, torch.stack([a, b]), [add] * len(SIZES))
    assert not bool(broken.any())
    for out, sum_of, before in zip(outs, sought, there, strict=True):
        before = before.double() if add else torch.zeros_like(sum_of)
        size = sum_of.abs() + before.abs()
        assert bool(((out.double() - sum_of - before).abs() <= 2 * torch.finfo(dtype).eps * size + 1e-7).all())


@pytest.mark.usefixtures("way")
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_combinations_that_break_are_told() -> None:
    """Not finite, too large for the dtype, too large in the sum; not a number that was not finite before."""
    ones = [torch.ones(3000, device=DEVICE) for _ in range(5)]
    outs = [torch.ones(3000, dtype=torch.float16, device=DEVICE) for _ in range(5)]
    ones[0][2999] = torch.nan
    ones[1] *= 1e5
    ones[2] *= 4e4
    outs[2] *= 4e4
    outs[3][7] = torch.inf
    weights = torch.tensor([[1.0] * 5, [0.0] * 5], device=DEVICE)
    broken = combine(outs, ones, [torch.ones_like(t) for t in ones], weights, [True] * 5)
    assert broken.tolist() == [True, True, True, False, False]


@pytest.mark.usefixtures("way")
def test_without_conflict_the_combination_is_the_sum_bit_for_bit() -> None:
    ps, ss = totals(torch.float32, 0), totals(torch.float32, 1)
    expected = [p + s for p, s in zip(ps, ss, strict=True)]
    combine(ps, ps, ss, torch.ones(2, len(SIZES), device=DEVICE), [False] * len(SIZES))
    assert all(torch.equal(p, sought) for p, sought in zip(ps, expected, strict=True))


NUMBERS = {  # dtype of the parameter; plasticity, stability, .grad before; weights
    "float32": (torch.float32, 1.0, 2.0, None, (1.0, 3.0)),
    "float32, added": (torch.float32, 1.0, 2.0, 4.0, (0.5, 3.0)),
    "bfloat16": (torch.bfloat16, 1.0, 2.0, None, (1.0, 3.0)),
    "bfloat16, added": (torch.bfloat16, 1.0, 2.0, 4.0, (1.0, 3.0)),
    "no stability": (torch.float32, 1.0, None, None, (2.0, 3.0)),
    "no plasticity": (torch.float32, None, 2.0, 1.0, (2.0, 3.0)),
    "neither": (torch.float32, None, None, 1.0, (2.0, 3.0)),
    "no stability, but its weight": (torch.float32, 1.0, None, None, (2.0, torch.inf)),
    "too large": (torch.float16, 1.0, 2e4, None, (1.0, 4.0)),
    "too large when added": (torch.float16, 1.0, 2e4, 6e4, (1.0, 1.0)),
    "not finite": (torch.bfloat16, torch.nan, 1.0, None, (1.0, 1.0)),
    "not finite before": (torch.bfloat16, 1.0, 1.0, torch.inf, (1.0, 1.0)),
}


@pytest.mark.usefixtures("way")
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("bucket", [1, 1 << 28])
def test_an_update_on_an_accelerator_is_that_on_a_cpu(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def parts() -> list[Part]:
        found = []
        for dtype, p, s, before, (a, b) in NUMBERS.values():
            parameter = torch.nn.Parameter(torch.zeros(5, 7, dtype=dtype))
            parameter.grad = None if before is None else torch.full_like(parameter, before)
            p, s = (None if each is None else torch.full((5, 7), each) for each in (p, s))
            found.append(Part(parameter, p, s, a, b, torch.inf))
        return found

    ours, expected = parts(), parts()
    held = add_update(iter(expected))
    monkeypatch.setattr(kernels, "serve", lambda _: True)
    monkeypatch.setattr(update, "_BUCKET", bucket)
    assert dict(zip(NUMBERS, add_update(iter(ours)), strict=True)) == dict(zip(NUMBERS, held, strict=True))
    assert [name for name, each in zip(NUMBERS, held, strict=True) if not each] == [
        "no stability, but its weight", "too large", "too large when added", "not finite",
    ]  # fmt: skip
    for name, one, other in zip(NUMBERS, ours, expected, strict=True):
        found, sought = one.parameter.grad, other.parameter.grad
        torch.testing.assert_close(found, sought, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
