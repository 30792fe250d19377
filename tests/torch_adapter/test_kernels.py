"""The accelerator's products of gradients against their definition in float64, on whatever device there is.

Without a GPU the Triton kernels run in Triton's interpreter, which `make kernels` installs and switches on.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import Routed, Small
from kernel_problems import (
    DEVICE,
    EVEN,
    MIXED,
    PACKED,
    WAYS,
    assert_right,
    by_definition,
    problem,
    products,
    triton_only,
)
from problems import batch, tiny_model
from test_pullback import assert_gradients_close, assert_statistics_close, pull

from pcr_torch import kernels
from pcr_torch.kernels import (
    Layout,
    choice,
    pairs,
    vector_products,
    weight_products,
)
from pcr_torch.products import Products


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("streams", [1, 2])
def test_dtypes_storage_and_streams(way: str, dtype: torch.dtype, transposed: bool, streams: int) -> None:
    owners, strata = EVEN
    x, dys = problem(owners, 33, 65, streams, dtype)
    got = products(way, x, dys, Layout.even(5, 7, strata, DEVICE), transposed=transposed)
    assert_right(got, by_definition(x, dys, owners, strata, transposed=transposed), 1e-6)
    assert {total.dtype for total in got.totals} == {torch.float32}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", [EVEN, PACKED, MIXED], ids=["even", "packed", "mixed"])
@pytest.mark.parametrize("widths", [(1, 7), (130, 65), (7, 130)], ids=str)
def test_rows_of_any_layout_and_widths(way: str, layout: Any, widths: tuple[int, int]) -> None:
    owners, strata = layout
    x, dys = problem(owners, *widths, 2)
    got = products(way, x, dys, Layout.owned(owners, sum(map(len, strata)), strata, DEVICE), transposed=False)
    assert_right(got, by_definition(x, dys, owners, strata, transposed=False), 1e-6)


@triton_only
@pytest.mark.parametrize("form", [(64, 128, 16, 8), (128, 64, 32, 8), (128, 128, 64, 8)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
def test_tiles_of_any_form(form: tuple[int, ...], transposed: bool) -> None:
    """Which of them is taken depends on sizes that are too large for an interpreter."""
    from pcr_torch.kernels import triton_weights

    owners, strata = PACKED
    x, dys = problem(owners, 150, 140, 2, torch.bfloat16)
    layout = Layout.owned(owners, 4, strata, DEVICE)
    totals = [torch.empty((150, 140) if transposed else (140, 150), device=DEVICE) for _ in dys]
    tiles = triton_weights.Tiles(*form)
    found = triton_weights.weight_products(x, dys, layout, totals, transposed=transposed, add=False, tiles=tiles)
    expected = by_definition(x, dys, owners, strata, transposed=transposed)
    assert_right(Products(totals, found[:, :4], found[:, 4:]), expected, 1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "exponents",
    [(0, -25, -25), (0, 18, 18), (18, -25, -30), (-12, 30, 18), (0, -25, 18), (-18, 18, 0), (-10, 37, -25)],
    ids=str,
)
def test_numbers_of_any_size_keep_their_products(way: str, exponents: tuple[int, int, int]) -> None:
    """Their squares leave float32."""
    owners, strata = EVEN
    x, dys = problem(owners, 33, 40, 2)
    x, *dys = ((10.0**k * t.double()).float() for k, t in zip(exponents, (x, *dys), strict=True))
    got = products(way, x, dys, Layout.even(5, 7, strata, DEVICE), transposed=False)
    assert_right(got, by_definition(x, dys, owners, strata, transposed=False), 1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("way", WAYS)
def test_streams_of_zeros_and_what_is_not_finite(way: str) -> None:
    owners, strata = EVEN
    x, dys = problem(owners, 33, 40, 2)
    layout = Layout.even(5, 7, strata, DEVICE)
    dys[1].zero_()
    assert_right(
        products(way, x, dys, layout, transposed=False), by_definition(x, dys, owners, strata, transposed=False), 1e-6
    )
    x[2 * 7 + 3, 4], dys[0][2 * 7 + 3] = torch.inf, 0.0  # 0 times infinity is to be seen
    got = products(way, x, dys, layout, transposed=False)
    assert not any(bool(total.isfinite().all()) for total in got.totals)
    assert not bool(got.response[:, 2].isfinite().any())
    assert not bool(got.stratum[:, 1].isfinite().any())
    assert bool(got.response[:, [0, 1, 3, 4]].isfinite().all())


@pytest.mark.parametrize("way", [WAYS[0], "plain torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_added_to_totals_in_their_memory(way: str, dtype: torch.dtype) -> None:
    owners, strata = EVEN
    x, dys = problem(owners, 33, 40, 2)
    layout = Layout.even(5, 7, strata, DEVICE)
    there = [torch.ones(40, 33, dtype=dtype, device=DEVICE) for _ in dys]
    got = weight_products(
        x.view(5, 7, 33), [dy.view(5, 7, 40) for dy in dys], layout, transposed=False, into=there, way=way
    )
    expected, _, _ = by_definition(x, dys, owners, strata, transposed=False)
    for total, mine, sought in zip(got.totals, there, expected, strict=True):
        assert total is mine
        torch.testing.assert_close(
            total.cpu(), (1 + sought).to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )


@pytest.mark.parametrize("way", [WAYS[0], "plain torch"])
def test_storage_that_is_not_dense(way: str) -> None:
    """Slices of columns and of tokens, transposed, repeated by stride 0, negated when read, of different dtypes."""
    owners, strata = EVEN
    wide = torch.randn(5, 9, 80, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    negated = torch.complex(wide, wide).conj().imag
    assert negated.is_neg()
    inputs = [
        wide[:, 2:, 40:],
        wide[:, :7, ::2],
        wide[:, :7].transpose(1, 2).contiguous().transpose(1, 2),
        negated[:, :7],
    ]
    repeated = wide[:, :1, :33].expand(5, 7, 33)
    layout = Layout.even(5, 7, strata, DEVICE)
    for x in inputs:
        dys = [repeated, wide[:, 1:8, :33].bfloat16()]
        got = weight_products(x, dys, layout, transposed=False, way=way)
        flat = [t.flatten(0, 1).resolve_neg() for t in (x, *dys)]
        assert_right(got, by_definition(flat[0], flat[1:], owners, strata, transposed=False), 1e-6)


@pytest.mark.parametrize("layout", [EVEN, PACKED, MIXED], ids=["even", "packed", "mixed"])
@pytest.mark.parametrize("exponent", [-25, 0, 18])
def test_biases(layout: Any, exponent: int) -> None:
    owners, strata = layout
    x, dys = problem(owners, 1, 33, 2)
    dys = [(10.0**exponent * dy.double()).float() for dy in dys]
    got = vector_products(dys, Layout.owned(owners, sum(map(len, strata)), strata, DEVICE))
    expected, *parts = by_definition(torch.ones_like(x), dys, owners, strata, transposed=False)
    assert_right(got, ([total[:, 0] for total in expected], *parts), 1e-6)


def test_a_workspace_that_holds_a_few_rows_of_the_weight() -> None:
    owners, strata = MIXED
    x, dys = problem(owners, 33, 40, 2)
    layout = Layout.owned(owners, 4, strata, DEVICE)
    for way in ("plain torch", "token Grams"):
        got = products(way, x, dys, layout, transposed=True, workspace=5 * 7 * 40 * 2)
        assert_right(got, by_definition(x, dys, owners, strata, transposed=True), 1e-6)


@pytest.mark.parametrize("way", [WAYS[0], "plain torch"])
def test_a_layer_without_rows(way: str) -> None:
    """An expert to which no token went."""
    x, dys = problem([], 33, 40, 2)
    layout = Layout.owned([], 2, [[0, 1]], DEVICE)
    for got in (weight_products(x, dys, layout, transposed=False, way=way), vector_products(dys, layout)):
        assert not any(bool(total.any()) for total in got.totals)
        assert not bool(got.response.any() | got.stratum.any())


@pytest.mark.parametrize("way", [WAYS[0], "plain torch"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "lora", "experts"])
def test_a_model_measured_as_on_an_accelerator(way: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "triton" and DEVICE.type == "cuda":
        pytest.skip("the model is on the CPU, so the kernels have to be interpreted")
    monkeypatch.setattr(choice, "_SMALLEST", 0)
    monkeypatch.setattr(choice, "chosen", lambda _: way)
    monkeypatch.setattr(pairs, "chosen", lambda _: way)
    data = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = {
            "lora": lambda: tiny_model("llama", lora=True),
            "experts": lambda: Small(Routed()),
        }.get(architecture, lambda: tiny_model(architecture))()
    loop, loop_gradients = pull(model, data, "loop")
    monkeypatch.setattr(kernels, "serve", lambda _: True)
    fast, fast_gradients = pull(model, data, "fast")
    assert_statistics_close(fast.statistics, loop.statistics, 1e-5)
    assert_gradients_close(fast_gradients, loop_gradients, 1e-4)
