"""Inner products of long gradients against exact sums, and the combination in place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pcr_torch.combine import add_combination, gradient_products

SIZE = 300_001  # three parts, the last of them short


def pair(cosine: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    p, noise = (torch.randn(SIZE, generator=generator) for _ in range(2))
    noise -= p * ((p.double() @ noise.double()) / (p.double() @ p.double())).float()
    s = cosine * p + math.sqrt(1 - cosine**2) * noise
    return p * scale, s * scale / 30


def exact(a: Tensor, b: Tensor) -> float:
    return math.fsum((a.double() * b.double()).tolist())


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e18], ids=["ordinary", "squares vanish", "squares overflow"])
@pytest.mark.parametrize("cosine", [-0.5, -0.02, -1e-3, -1e-6, 0.0])
def test_products_to_six_digits(cosine: float, scale: float) -> None:
    p, s = pair(cosine, scale)
    pp, ss, ps = gradient_products(p, s).tolist()
    assert pp == pytest.approx(exact(p, p), rel=1e-6)
    assert ss == pytest.approx(exact(s, s), rel=1e-6)
    bound = 8 * SIZE * 2**-53 * math.fsum((p.double() * s.double()).abs().tolist())
    assert abs(ps - exact(p, s)) <= 1e-6 * abs(exact(p, s)) + bound


def test_equal_terms_which_all_round_alike() -> None:
    p, s = (torch.full((1_000_003,), value) for value in (0.1, 0.3))
    for found, one in zip(gradient_products(p, s).tolist(), [(0, 0), (1, 1), (0, 1)], strict=True):
        a, b = (float((p, s)[k][0]) for k in one)
        assert found == pytest.approx(1_000_003 * a * b, rel=1e-6)


def test_products_of_nothing_and_of_what_is_not_finite() -> None:
    p, s = pair(-0.5)
    assert gradient_products(p, torch.zeros_like(s)).tolist()[1:] == [0.0, 0.0]
    s[7] = torch.nan
    found = gradient_products(p, s)
    assert bool(torch.isfinite(found[0]))
    assert bool(found[1:].isnan().all())


@pytest.mark.parametrize("a", [1.0, 0.25])
def test_combination_adds_to_grad_in_place(a: float) -> None:
    p, s = pair(-0.5)
    expected = 1 + a * p + 3.0 * s
    parameter = nn.Parameter(torch.zeros(SIZE))
    parameter.grad = torch.ones(SIZE)
    add_combination(parameter, p, s, a, 3.0)
    torch.testing.assert_close(parameter.grad, expected)
    fresh = nn.Parameter(torch.zeros(SIZE))
    p, s = pair(-0.5)
    add_combination(fresh, p, s, a, 3.0)
    assert fresh.grad is not None
    assert fresh.grad.data_ptr() == p.data_ptr()


def test_whether_what_is_written_is_finite() -> None:
    """Judged of what is added, and of its sum with a gradient that was there; not of that gradient alone."""

    def added(value: float, before: float | None = None, dtype: torch.dtype = torch.float16, **bound: float) -> bool:
        parameter = nn.Parameter(torch.zeros(2, dtype=dtype))
        if before is not None:
            parameter.grad = torch.full((2,), before, dtype=dtype)
        return add_combination(parameter, torch.tensor([value, 1.0]), None, 1.0, 1.0, **bound)

    assert added(6e4, bound=6e4)
    assert not added(7e4, bound=7e4)
    assert not added(4e4, before=4e4)
    assert added(4e4, before=math.inf)
    assert not added(7e4, before=math.inf)
    assert added(7e4, dtype=torch.bfloat16)
    assert not added(3.4e38, dtype=torch.bfloat16)
    assert not added(3e38, before=3e38, dtype=torch.float32)
