"""The fast pullback against the per-response loop, and both against dense contributions in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from problems import ARCHITECTURES, Batch, batch, tiny_model
from torch import Tensor, nn

import pcr_core
from pcr_core import BlockStatistics
from pcr_torch import PCR, Report, cpu
from pcr_torch.cpu import _spans, prefers_gram, weight_products
from pcr_torch.kernels import Layout, plain


def pull(model: nn.Module, data: Batch, norms: str, **options: object) -> tuple[Report, dict[str, Tensor]]:
    model.zero_grad()
    method = PCR(model, noise_every=1, norms=norms, **options)  # type: ignore[arg-type]
    assert method.norms == norms
    logp = data.logp(model)
    method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
    report = method.resolve()
    method.remove()
    return report, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def resolved(
    model: nn.Module, logp_of: Callable[[], Tensor], cotangents: Sequence[Tensor], group_ids: Tensor, **options: Any
) -> tuple[BlockStatistics[Tensor], dict[str, Tensor]]:
    """`pull` for cotangents of one's own."""
    model.zero_grad()
    method = PCR(model, noise_every=1, **options)
    method.accumulate_cotangents(logp_of(), *cotangents, group_ids=group_ids)
    report = method.resolve()
    method.remove()
    return report.statistics, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_fast_equals_loop(
    model: nn.Module,
    logp_of: Callable[[], Tensor],
    cotangents: Sequence[Tensor],
    group_ids: Tensor,
    *,
    blocks: str = "mlp",
    tolerances: tuple[float, float] = (1e-5, 1e-5),
) -> None:
    """Statistics and gradients, to `tolerances`."""
    fast, loop = (
        resolved(model, logp_of, cotangents, group_ids, blocks=blocks, norms=norms) for norms in ("fast", "loop")
    )
    assert_statistics_close(fast[0], loop[0], tolerances[0])
    assert_gradients_close(fast[1], loop[1], tolerances[1])


def assert_sum_equals_backward(
    model: nn.Module, logp_of: Callable[[], Tensor], cotangents: Sequence[Tensor], group_ids: Tensor, *, blocks: str
) -> None:
    """Under plain GRPO the fast path gives every parameter the gradient of an ordinary backward pass."""
    model.zero_grad()
    logp_of().backward(sum(cotangents[1:], start=cotangents[0]))
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    rule = pcr_core.GRPO()
    found = resolved(model, logp_of, cotangents, group_ids, blocks=blocks, norms="fast", rule=rule)[1]
    assert_gradients_close(found, expected, 1e-5)


def assert_statistics_close(got: BlockStatistics[Tensor], expected: BlockStatistics[Tensor], tolerance: float) -> None:
    """Relative to the sizes that the sums are made of, since inner products may cancel."""
    mean = (expected.plasticity_sq * expected.stability_sq).sqrt()
    noise = (expected.plasticity_var * expected.stability_var).sqrt()
    for f in fields(expected):
        scale = {"dot": mean, "covariance": noise}.get(f.name, getattr(expected, f.name))
        error = (getattr(got, f.name) - getattr(expected, f.name)).abs()
        assert bool((error <= tolerance * scale).all()), (f.name, error / scale)


def assert_gradients_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (got[name] - gradient).double().norm()
        assert error <= tolerance * gradient.double().norm(), (name, error / gradient.double().norm())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fast_equals_loop(architecture: str, lora: bool, checkpointing: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_model(architecture, lora=lora)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
            if lora:
                model.enable_input_require_grads()  # type: ignore[operator]
            model.train()
        data = batch()
        fast, fast_grads = pull(model, data, "fast")
        loop, loop_grads = pull(model, data, "loop")
    assert_statistics_close(fast.statistics, loop.statistics, 1e-5)
    assert_gradients_close(fast_grads, loop_grads, 1e-4)


def test_reentrant_checkpointing_on_the_fast_path() -> None:
    model = tiny_model("llama")
    data = batch()
    plain, plain_grads = pull(model, data, "fast")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
        model.train()
        again, again_grads = pull(model, data, "fast")
    assert_statistics_close(again.statistics, plain.statistics, 1e-6)
    assert_gradients_close(again_grads, plain_grads, 1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bfloat16_weights(architecture: str) -> None:
    model = tiny_model(architecture, dtype=torch.bfloat16)
    fast, fast_grads = pull(model, batch(), "fast")
    loop, loop_grads = pull(model, batch(), "loop")
    assert all(g.dtype == torch.bfloat16 for g in fast_grads.values())
    assert_statistics_close(fast.statistics, loop.statistics, 0.03)
    assert_gradients_close(fast_grads, loop_grads, 0.03)


def test_bfloat16_autocast_keeps_float32_gradients() -> None:
    model, data = tiny_model("llama"), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast, fast_grads = pull(model, data, "fast")
        loop, loop_grads = pull(model, data, "loop")
    assert all(g.dtype == torch.float32 for g in fast_grads.values())
    assert_statistics_close(fast.statistics, loop.statistics, 0.03)
    assert_gradients_close(fast_grads, loop_grads, 0.03)


@pytest.mark.parametrize("norms", ["fast", "loop"])
def test_statistics_and_update_equal_the_dense_method(norms: str) -> None:
    """Contributions of every response by plain autograd in float64, resolved by pcr_core on dense arrays."""
    model, data = tiny_model("llama", dtype=torch.float64), batch()
    rule = pcr_core.PCR(alpha="snr", gate="probability")
    report, grads = pull(model, data, norms, rule=rule)

    names = [name for block in report.blocks for name in block.parameters]
    leaves = [model.get_parameter(name) for name in names]
    logp = data.logp(model)
    objective = data.objective(logp)
    streams = []
    for losses in (objective.plasticity_loss, objective.stability_loss):
        rows = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses]
        streams.append(torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]))
    dense = pcr_core.resolve(*streams, group_ids=data.group_ids, sizes=[leaf.numel() for leaf in leaves], rule=rule)
    # log-probabilities are float32 in `Batch.logp`, so that is as close as they can be
    assert_statistics_close(report.statistics, dense.statistics, 1e-5)
    update = torch.cat([grads[name].reshape(-1) for name in names])
    assert (update - dense.update).norm() <= 1e-5 * dense.update.norm()


@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("way", ["tiles", "tiles and token Grams"])
def test_two_ways_to_products(way: str, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an accelerator are in test_kernels.py."""
    monkeypatch.setattr(cpu, "_LANES", 16)  # tiles and chunks that do not divide the sizes
    monkeypatch.setattr(cpu, "_TILE", 600)
    monkeypatch.setattr(cpu, "prefers_gram", lambda *_: way == "tiles and token Grams")
    generator = torch.Generator().manual_seed(0)
    x, dy, dz = (torch.randn(5, 7, k, generator=generator) for k in (40, 50, 50))
    strata = [[0, 3], [2], [1, 4]]
    got = weight_products(x, [dy, dz], strata, transposed=transposed)
    g, h = (torch.einsum("nto,nti->noi", d.double(), x.double()) for d in (dy, dz))
    for pair, (a, b) in enumerate(((g, g), (h, h), (g, h))):
        scale = (a * b).abs().sum((1, 2))
        assert bool(((got.response[pair] - (a * b).sum((1, 2))).abs() <= 1e-6 * scale).all())
        for q, rows in enumerate(strata):
            one, other = a[rows].sum(0), b[rows].sum(0)
            assert abs(got.stratum[pair, q] - (one * other).sum()) <= 1e-6 * (one * other).abs().sum()
    for total, expected in zip(got.totals, (g.sum(0), h.sum(0)), strict=True):
        torch.testing.assert_close(total, (expected.T if transposed else expected).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
def test_products_leave_out_tokens_without_gradient(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "prefers_gram", lambda *_: False)
    x, dy, dz = (torch.randn(5, 7, k, generator=torch.Generator().manual_seed(k)) for k in (8, 9, 10))
    dz = dz[..., :9]
    for each in (dy, dz):
        each[0, :2], each[1, 5:], each[2], each[3, 3:5] = 0.0, 0.0, 0.0, 0.0
    dy[0, 1, -1] = dz[1, 5, -2] = 1.0  # seen in one stream alone, and beyond the first features
    spans = [slice(1, 7), slice(0, 6), slice(0, 0), slice(0, 7), slice(0, 7)]
    assert _spans(x, [dy, dz]) == spans
    strata = [[0, 3], [1, 2, 4]]
    got = weight_products(x, [dy, dz], strata, transposed=transposed)
    layout = Layout.even(5, 7, strata, x.device)
    totals, found = plain.weight_products(
        x.flatten(0, 1), [dy.flatten(0, 1), dz.flatten(0, 1)], layout, transposed=transposed
    )
    torch.testing.assert_close(torch.cat([got.response, got.stratum], dim=1), found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.totals, totals, rtol=1e-5, atol=1e-5)
    x[2, 3, 4] = torch.inf  # with a gradient of 0
    broken = weight_products(x, [dy, dz], strata, transposed=transposed)
    assert not any(total.isfinite().all() for total in broken.totals)
    assert not broken.response[:, 2].isfinite().any()
    assert bool(broken.response[:, [0, 1, 3, 4]].isfinite().all())


@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
def test_token_grams_of_half_precision_are_of_the_same_numbers_as_their_sums(transposed: bool) -> None:
    """The variance is the small difference of the two where responses nearly agree."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(1, 3, k, generator=generator) for k in (24, 32))
    x, dy = ((t + 0.01 * torch.randn(8, *t.shape[1:], generator=generator)).bfloat16() for t in (x, dy))
    got = weight_products(x, [dy], [list(range(8))], transposed=transposed)
    g = torch.einsum("nto,nti->noi", dy.double(), x.double()).flatten(1)
    expected = (g - g.mean(0)).square().sum() / 7
    torch.testing.assert_close((got.response.sum() - got.stratum.sum() / 8) / 7, expected, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("exponent", [-25, -20, -19, -12, 0, 12, 18, 20, 25])
def test_factors_far_from_one_keep_their_products(exponent: int) -> None:
    """Of token Grams too, whose squares leave float32 where those of the gradient do not."""
    generator = torch.Generator().manual_seed(0)
    x, dy, dz = (torch.randn(4, 3, k, generator=generator) for k in (24, 32, 32))
    expected = weight_products(x, [dy, dz], [[0, 1], [2, 3]], transposed=False)
    far = [(10.0**-exponent * d.double()).float() for d in (dy, dz)]
    got = weight_products((10.0**exponent * x.double()).float(), far, [[0, 1], [2, 3]], transposed=False)
    torch.testing.assert_close(got.response, expected.response, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.stratum, expected.stratum, rtol=1e-5, atol=1e-4)


def test_an_input_that_is_negated_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "prefers_gram", lambda *_: False)
    x = torch.fft.fft(torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))).conj().imag
    assert x.is_neg()
    dy = torch.randn(3, 7, 9)
    got, expected = (weight_products(t, [dy], [[0, 1, 2]], transposed=False) for t in (x, x.resolve_neg()))
    torch.testing.assert_close(got.totals, expected.totals)


def test_the_cheaper_way_is_taken() -> None:
    assert prefers_gram(length=16, features=512, outputs=1536, streams=2)
    assert not prefers_gram(length=128, features=512, outputs=1536, streams=2)
    assert not prefers_gram(length=16, features=512, outputs=1536, streams=2, sums=1.0)


def test_realistic_sizes() -> None:
    """512 x 1536 and 128 tokens, where rounding and tiles matter."""
    generator = torch.Generator().manual_seed(0)
    x, dy, dz = (torch.randn(4, 128, k, generator=generator) for k in (512, 1536, 1536))
    got = weight_products(x, [dy, dz], [[0, 1], [2, 3]], transposed=False)
    g, h = (torch.einsum("nto,nti->noi", d.double(), x.double()) for d in (dy, dz))
    torch.testing.assert_close(got.response[0], (g * g).sum((1, 2)), rtol=1e-6, atol=0.0)
    assert bool(((got.response[2] - (g * h).sum((1, 2))).abs() <= 1e-7 * (g * h).abs().sum((1, 2))).all())
    one = g[:2].sum(0)
    torch.testing.assert_close(got.stratum[0, 0], (one * one).sum(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_gradients_far_from_one_keep_their_statistics(scale: float) -> None:
    """Squares of float32 gradients would leave float32's range."""
    model, data = tiny_model("llama"), batch()
    method = PCR(model, noise_every=1, norms="fast")
    reports = []
    for factor in (1.0, scale):
        logp = data.logp(model)
        objective = data.objective(logp)
        method.accumulate_cotangents(
            logp,
            factor * objective.plasticity_cotangent,
            factor * objective.stability_cotangent,
            group_ids=data.group_ids,
        )
        reports.append(method.resolve())
    one, far = reports[0].statistics, reports[1].statistics
    for name in ("plasticity_sq", "stability_var", "covariance"):
        torch.testing.assert_close(getattr(far, name), getattr(one, name) * scale**2, rtol=1e-4, atol=0.0)


def test_a_layer_used_twice_takes_the_loop() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(31, 8)
            self.shared = nn.Linear(8, 8)
            self.head = nn.Linear(8, 31)

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.shared(torch.tanh(self.shared(self.embed(tokens))))
            out: Tensor = self.head(hidden)
            return out

    model, data = Twice(), batch()

    def logp() -> Tensor:
        logits = model(data.tokens)[:, data.prompt - 1 : -1].log_softmax(-1)
        out: Tensor = logits.gather(-1, data.tokens[:, data.prompt :, None]).squeeze(-1)
        return out

    method = PCR(model, noise_every=1, blocks="shared.weight", norms="fast")
    lp = logp()
    with pytest.raises(ValueError, match=r"shared\.weight cannot be measured.*used twice.*norms='auto'"):
        method.accumulate(lp, data.objective(lp), group_ids=data.group_ids)
    method.remove()
    model.zero_grad()
    method = PCR(model, noise_every=1, blocks="shared.weight", rule=pcr_core.GRPO())
    lp = logp()
    objective = data.objective(lp)
    (expected,) = torch.autograd.grad(
        (objective.plasticity_loss + objective.stability_loss).sum(), [model.shared.weight], retain_graph=True
    )
    method.accumulate(lp, objective, group_ids=data.group_ids)
    method.resolve()
    torch.testing.assert_close(model.shared.weight.grad, expected)


def test_a_weight_read_outside_its_layer_is_refused() -> None:
    """A fused head reads lm_head.weight without calling lm_head: the probe would see nothing."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(31, 8)
            self.lm_head = nn.Linear(8, 31, bias=False)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embed(tokens) @ self.lm_head.weight.T

    model, data = Fused(), batch()
    method = PCR(model, noise_every=1, blocks="lm_head", norms="fast")
    logp = model(data.tokens)[:, data.prompt - 1 : -1].log_softmax(-1)
    logp = logp.gather(-1, data.tokens[:, data.prompt :, None]).squeeze(-1)
    with pytest.raises(
        ValueError, match=r"lm_head\.weight cannot be measured on the fast path: it is used outside its layer"
    ):
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
