"""What an update asks of the host, in dispatched operators: what a GPU waits for can be counted without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from counting import Counting
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import pcr_core
from pcr_torch import PCR, kernels
from pcr_torch.kernels import Layout
from pcr_torch.products import Products
from pcr_torch.pullback import PAIRS

LAYERS = 24
WITHOUT, WITH = pcr_core.PCR(), pcr_core.PCR(alpha="snr")
WAITS = r"local_scalar_dense|nonzero|masked_select|equal\.default"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, num_key_value_heads=2, **small))


def problem(model: nn.Module, n: int) -> tuple[Callable[[], Tensor], Tensor, Tensor]:
    tokens = torch.randint(64, (n, 17), generator=torch.Generator().manual_seed(0))

    def logp() -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        taken: Tensor = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        return taken

    return logp, torch.randn(2, n, 16, generator=torch.Generator().manual_seed(1)), torch.arange(n) // 4


def two_passes(model: nn.Module, n: int) -> int:
    logp, cotangents, _ = problem(model, n)
    model.zero_grad()
    with Counting() as counted:
        out, leaves = logp(), list(model.parameters())
        torch.autograd.grad(out, leaves, cotangents[0], retain_graph=True)
        torch.autograd.grad(out, leaves, cotangents[1])
    return counted.total


def update(model: nn.Module, n: int, rule: Any) -> Counting:
    """Of the second step, in which buffers and indices are as they stay."""
    logp, cotangents, ids = problem(model, n)
    method = PCR(model, rule=rule, noise_every=1 if rule == WITH else 0)
    for _ in range(2):
        model.zero_grad()
        with Counting() as counted:
            method.accumulate_cotangents(logp(), *cotangents, group_ids=ids)
            report = method.resolve()
    method.remove()
    assert report.path == ("fast" if rule == WITH else "autograd")
    return counted


@pytest.mark.parametrize(("rule", "aim"), [(WITHOUT, 1.15), (WITH, 1.6)], ids=["without noise", "with noise"])
def test_operators_beyond_two_plain_passes(model: nn.Module, rule: Any, aim: float) -> None:
    assert update(model, 8, rule).total <= aim * two_passes(model, 8)


def one_launch(
    x: Tensor, dys: Sequence[Tensor], layout: Layout, *, transposed: bool, **_: Any
) -> Products:  # what a kernel gives, by two matrix products
    x, *dys = (t.reshape(-1, t.shape[-1]) for t in (x, *dys))
    totals = [x.T @ dy if transposed else dy.T @ x for dy in dys]
    found = x.new_zeros((len(PAIRS[len(dys)]), layout.responses + len(layout.strata)), dtype=torch.float64)
    return Products(totals, found[:, : layout.responses], found[:, layout.responses :])


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of an accelerator, with stand-ins for what is one launch there."""

    def pair_products(firsts: Sequence[Tensor], seconds: Sequence[Tensor], **_: Any) -> Tensor:
        return torch.ones(len(firsts), 3, dtype=torch.float64)

    def combine(outs: Sequence[Tensor], *_: Any) -> Tensor:
        return torch.zeros(len(outs), dtype=torch.bool)

    monkeypatch.setattr(kernels, "serve", lambda device: True)
    for stand_in in (pair_products, combine):
        monkeypatch.setattr(kernels, stand_in.__name__, stand_in)
    monkeypatch.setattr(kernels, "weight_products", one_launch)


@pytest.mark.parametrize(("rule", "aim"), [(WITHOUT, 1.15), (WITH, 1.6)], ids=["without noise", "with noise"])
def test_operators_on_an_accelerator(model: nn.Module, rule: Any, aim: float, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    small, large = update(model, 8, rule), update(model, 16, rule)
    assert small.total <= aim * two_passes(model, 8)
    assert abs(large.total - small.total) <= 0.01 * small.total


@pytest.mark.parametrize("rule", [WITHOUT, WITH], ids=["without noise", "with noise"])
def test_waits_do_not_grow_with_the_model(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    waits = []
    for layers in (2, 6):
        made = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, num_key_value_heads=2, **small))
        waits.append(update(made, 8, rule).of(WAITS))
    assert waits[0] == waits[1]
    assert waits[0] <= 20
