"""Rows that two streams share: what is reused is right, and what cannot be is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import batch, tiny_model
from test_pullback import assert_gradients_close, assert_statistics_close, pull
from torch import Tensor, nn

from pcr_torch.products import matrix_gradient
from pcr_torch.recorder import Recorder
from pcr_torch.rows import Multiples, row_factors


class Back:
    """dy -> dx that counts the rows it is asked for."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.rows = weight, 0

    def __call__(self, dy: Tensor) -> Tensor:
        self.rows += dy[..., 0].numel()
        return dy @ self.weight


def streams(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Two gradients (3, 40, 24) whose rows are multiples of each other, and a weight (24, 16)."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(3, 40, 24, generator=generator)
    p, s = (one * torch.randn(3, 40, 1, generator=generator) * scale for _ in range(2))
    return p.to(dtype), s.to(dtype), torch.randn(24, 16, generator=generator).to(dtype)


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e15])
def test_multiples_take_no_product(scale: float) -> None:
    p, s, weight = streams(scale)
    back = Back(weight)
    torch.testing.assert_close(
        Multiples.of(p, s).input_gradient(back, p @ weight), s @ weight, rtol=2e-6, atol=2e-6 * scale
    )
    assert back.rows == 0


def test_one_large_element_hides_no_multiple() -> None:
    """As where logits come in: the token that was drawn, and thousands that were not."""
    logits = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    p = nn.functional.one_hot(torch.arange(64), 4096) - logits.softmax(dim=-1)
    assert row_factors(p, torch.linspace(-3, 3, 64)[:, None] * p)[1].all()


def test_rows_that_differ_take_their_own() -> None:
    p, s, weight = streams()
    p[0, :5] = 0  # clipped tokens: the first stream says nothing of the second's direction
    s[1, 7, 3] += 1e-4
    s[2, 1] = 0
    back = Back(weight)
    torch.testing.assert_close(Multiples.of(p, s).input_gradient(back, p @ weight), s @ weight, rtol=2e-6, atol=2e-6)
    assert back.rows == 6


def test_nothing_alike_is_one_ordinary_product() -> None:
    p, s, weight = streams()
    s = torch.randn_like(s)
    back = Back(weight)
    assert torch.equal(Multiples.of(p, s).input_gradient(back, p @ weight), s @ weight)
    assert back.rows == s[..., 0].numel()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("clipped", [0, 5, 35])
def test_the_sum_of_both_streams_is_not_formed_for_the_weight(clipped: int, transposed: bool) -> None:
    p, s, _ = streams()
    p[0, :clipped] = 0
    p[1, :clipped] = 0
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(1))
    found = Multiples.of(p, s).weight_gradient(x, transposed=transposed)
    torch.testing.assert_close(found, matrix_gradient(x, p + s, transposed=transposed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stream", [0, 1])
def test_non_finite_rows_are_never_multiples(value: float, stream: int) -> None:
    p, s, weight = streams()
    (p, s)[stream][1, 2, 3] = value
    _, alike = row_factors(p, s)
    assert not alike[42]
    assert int(alike.sum()) == len(alike) - 1
    out = Multiples.of(p, s).input_gradient(Back(weight), p @ weight)
    assert torch.equal(torch.isfinite(out), torch.isfinite(s @ weight))


def test_a_stream_too_small_to_carry_digits_is_not_taken() -> None:
    p, s, _ = streams()
    assert not row_factors(1e-30 * p, s)[1].any()
    assert not row_factors(p, 1e-30 * s)[1].any()
    assert not row_factors(1e12 * p, 1e-36 * s)[1].any()  # their quotient is 0 in float32


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_above_the_last_attention_the_second_stream_takes_no_products(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: dict[int, int] = {}

    class Counted(Multiples):
        def input_gradient(self, back: Any, carried: Tensor) -> Tensor:
            width = self.second.shape[-1]
            shared[width] = shared.get(width, 0) + int(self.alike.sum())
            return super().input_gradient(back, carried)

    monkeypatch.setattr("pcr_torch.recorder.Multiples", Counted)
    data = batch()
    pull(tiny_model(architecture), data, "fast")
    assert shared[31] > 0.7 * data.tokens.numel()  # the head; clipped tokens are missing


class Mixing(nn.Module):
    """Every token above the layers sees all others, forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 31)

    def forward(self, input_ids: Tensor) -> nn.Module:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        self.logits = self.head(hidden + hidden.mean(dim=1, keepdim=True)).roll(1, dims=1)
        return self


def test_tokens_that_see_each_other() -> None:
    torch.manual_seed(0)
    model = Mixing()
    fast, fast_grads = pull(model, batch(), "fast", blocks=r"layers.*weight")
    loop, loop_grads = pull(model, batch(), "loop", blocks=r"layers.*weight")
    assert_statistics_close(fast.statistics, loop.statistics, 1e-5)
    assert_gradients_close(fast_grads, loop_grads, 1e-5)


def test_what_is_kept_for_it_belongs_to_the_last_layer() -> None:
    model = tiny_model("llama")
    recorder = Recorder(model, {n: p for n, p in model.named_parameters() if ".mlp." in n})
    assert {path for path in recorder._top if "layers" in path and "layers.1" not in path} == set()
    assert "lm_head" in recorder._top
