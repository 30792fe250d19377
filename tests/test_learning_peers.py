"""TorchJD's aggregators as rules, and ours against theirs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import pcr_core

if importlib.util.find_spec("torchjd") is None:
    pytest.skip("torchjd is not installed: pip install --no-deps torchjd", allow_module_level=True)

from benchmarks.learning import peers

needs = {
    "UPGrad": pytest.mark.skipif(importlib.util.find_spec("quadprog") is None, reason="UPGrad needs quadprog"),
    "CAGrad": pytest.mark.skipif(importlib.util.find_spec("clarabel") is None, reason="CAGrad needs cvxpy, clarabel"),
}
EACH = [pytest.param(name, marks=needs.get(name, ())) for name in ("PCGrad", "MGDA", "UPGrad", "CAGrad")]


def statistics(p: torch.Tensor, s: torch.Tensor) -> pcr_core.BlockStatistics[torch.Tensor]:
    one = torch.ones(len(p), dtype=torch.float64)
    return pcr_core.BlockStatistics((p * p).sum(1), (s * s).sum(1), (p * s).sum(1), one, one, 0 * one, one)


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """40 pairs in 5 dimensions at very different lengths, about half of them in conflict."""
    generator = torch.Generator().manual_seed(0)
    p, s = torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    return p, s * torch.logspace(-2, 2, 40, dtype=torch.float64)[:, None]


def test_our_pcgrad_is_theirs(pairs: tuple[torch.Tensor, torch.Tensor]):
    ours, theirs = pcr_core.PCGrad()(statistics(*pairs)), peers.PCGrad()(statistics(*pairs))
    torch.testing.assert_close(ours.plasticity, theirs.plasticity, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.stability, theirs.stability, rtol=1e-12, atol=1e-12)


def test_our_mgda_is_no_longer_than_theirs_which_stops_early(pairs: tuple[torch.Tensor, torch.Tensor]):
    p, s = pairs
    lengths = []
    for rule in (pcr_core.MGDA(), peers.MGDA()):
        w = rule(statistics(p, s))
        torch.testing.assert_close(w.plasticity + w.stability, torch.ones(40, dtype=torch.float64))
        lengths.append((w.plasticity[:, None] * p + w.stability[:, None] * s).norm(dim=1))
    shortest = torch.minimum(p.norm(dim=1), s.norm(dim=1))
    assert (lengths[0] <= lengths[1] * (1 + 1e-9)).all()
    assert (lengths[1] - lengths[0] <= 0.01 * shortest).all()


@pytest.mark.parametrize("name", EACH)
def test_weights_are_those_of_the_aggregator_on_the_vectors(name: str, pairs: tuple[torch.Tensor, torch.Tensor]):
    from torchjd import aggregation

    p, s = (x[::8] for x in pairs)
    theirs = {
        "PCGrad": aggregation.PCGrad, "MGDA": aggregation.MGDA,
        "UPGrad": lambda: aggregation.UPGrad(pref_vector=torch.ones(2, dtype=torch.float64)),
        "CAGrad": lambda: lambda rows: 2 * aggregation.CAGrad(c=0.5)(rows),
    }[name]()  # fmt: skip
    w = pcr_core.make_rule(f"benchmarks.learning.peers:{name}")(statistics(p, s))
    for i in range(len(p)):
        update = w.plasticity[i] * p[i] + w.stability[i] * s[i]
        torch.testing.assert_close(update, theirs(torch.stack([p[i], s[i]])), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EACH)
def test_no_kl_gradient_and_gradients_that_are_not_finite(name: str):
    p, s = torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    p[1, 0] = torch.nan
    w = pcr_core.make_rule(f"benchmarks.learning.peers:{name}")(statistics(p, s))
    assert w.finite.tolist() == [True, False, True]
    assert w.plasticity.isfinite().tolist() == [True, False, True]
