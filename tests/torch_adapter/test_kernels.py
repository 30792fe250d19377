"""The accelerator's products of gradients against their definition in float64, on whatever device there is.

Without a GPU the Triton kernels run in Triton's interpreter, which `make kernels` installs and switches on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import batch, tiny_model
from test_cases import Routed, Small
from test_pullback import assert_gradients_close, assert_statistics_close, pull
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import pcr_core
from pcr_torch import PCR, kernels, update
from pcr_torch.kernels import (
    Layout,
    choice,
    chosen,
    combine,
    pair_products,
    pairs,
    plain,
    vector_products,
    weight_products,
)
from pcr_torch.products import Products
from pcr_torch.pullback import PAIRS
from pcr_torch.update import Part, add_update

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


class Dispatched(TorchDispatchMode):
    """Names of operators that reach a device, and which of them wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> list[str]:
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "item")
        return [name for name in self.names if any(each in name for each in waiting)]


@pytest.mark.parametrize("by_gram", [False, True], ids=["explicit", "token Grams"])
@pytest.mark.parametrize("rows", ["even, strata in order", "even", "mixed"])
def test_as_many_operators_whatever_the_batch_and_none_that_waits(by_gram: bool, rows: str) -> None:
    """A host that waits in every layer is slower than the device."""
    counts = set()
    for n, groups, length in ((4, 2, 3), (24, 2, 5), (24, 8, 3)):
        strata = [list(range(q, n, groups)) for q in range(groups)]
        if rows == "even, strata in order":
            strata = np.arange(n).reshape(groups, -1).tolist()
        x, dy, dz = (torch.randn(n * length, k).to(DEVICE) for k in (33, 40, 40))
        owners = np.random.default_rng(0).permutation(np.repeat(np.arange(n), length))
        with Dispatched() as dispatched:
            mixed = rows == "mixed"
            layout = Layout.owned(owners, n, strata, DEVICE) if mixed else Layout.even(n, length, strata, DEVICE)
            plain.weight_products(x, [dy, dz], layout, transposed=False, by_gram=by_gram)
        assert not dispatched.waits
        counts.add(len(dispatched.names))
    assert len(counts) == 1
    assert counts.pop() <= 110


def test_layers_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro-batch waits as often whatever the number of layers."""
    monkeypatch.setattr(kernels, "serve", lambda _: True)
    waits = []
    for layers in (2, 5):
        config = LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        data = batch()
        method = PCR(model := LlamaForCausalLM(config), norms="fast", rule=pcr_core.PCR(alpha="snr"))
        logp = data.logp(model)
        objective = data.objective(logp)
        with Dispatched() as dispatched:
            method.accumulate(logp, objective, group_ids=data.group_ids)
        waits.append(dispatched.waits)
    assert waits[0] == waits[1]


def test_what_is_chosen_is_told_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    choice._log_once.cache_clear()
    x, dys = problem([0, 1], 3, 4, 1)
    with caplog.at_level("INFO", logger="pcr_torch"):
        for _ in range(2):
            weight_products(x, dys, Layout.even(2, 1, [[0, 1]], DEVICE), transposed=False)
    assert len(caplog.messages) == 1
    assert chosen(x.device) in caplog.text
    assert chosen(torch.device("cpu")) == "plain torch (Triton kernels are for CUDA, not cpu)"
    assert "plain torch" in chosen(torch.device("xpu"))


def test_a_cuda_device_without_triton_has_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    choice._why_not.cache_clear()
    monkeypatch.setattr(choice, "find_spec", lambda _: None)
    assert chosen(torch.device("cuda", 7)) == "plain torch (triton is not installed)"
    choice._why_not.cache_clear()


def test_strata_that_miss_a_response_are_refused() -> None:
    with pytest.raises(ValueError, match="strata must hold each of 0 to 2 once"):
        Layout.even(3, 4, [[0, 1]], DEVICE)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (make kernels)")
def test_kernels_compile_for_gpus_and_keep_their_accumulators_in_registers() -> None:
    """The interpreter takes what a GPU's compiler may not. Spilled accumulators would be slow, in silence."""
    script = Path(__file__).with_name("triton_compiled.py")
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr[-2000:]
    spilled = json.loads(ran.stdout.splitlines()[-1])
    few = ("bf16 sm_90", "fp16 sm_90", "products", "combine")
    assert all(count == 0 for name, count in spilled.items() if name.startswith(few)), spilled
    assert all(count < 1024 for count in spilled.values()), spilled
