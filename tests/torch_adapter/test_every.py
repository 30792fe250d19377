"""Amortised PCR: the steps between measured ones are a P + b S with the last weights, and one backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import batch, tiny_model
from test_pullback import assert_gradients_close
from torch import Tensor, nn

import pcr_core
from pcr_torch import PCR, Report

RULE = pcr_core.PCR(alpha="snr")


def step(model: nn.Module, method: PCR, seed: int, parts: int = 1) -> tuple[Report, dict[str, Tensor]]:
    """One step on new data; the gradients it leaves."""
    model.zero_grad()
    data = batch(n=8, seed=seed)
    rows = [[0, 2, 3, 4, 5, 6, 1, 7]] if parts == 1 else [[0, 2, 3], [4, 5, 6], [1, 7]]
    for part in rows:
        piece = data.rows(part)
        logp = piece.logp(model)
        method.accumulate(logp, piece.objective(logp), group_ids=piece.group_ids)
    report = method.resolve()
    return report, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_block(model: nn.Module, every: int, **options: Any) -> PCR:
    return PCR(model, granularity="global", rule=RULE, every=every, **options)


def lora() -> nn.Module:
    model = tiny_model("llama", lora=True)
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name and ".mlp." in name)
    return model


@pytest.mark.parametrize("parts", [1, 3])
def test_steps_between_use_the_last_weights(parts: int) -> None:
    model = lora()
    method = one_block(model, 3)
    measured = [step(model, method, seed, parts) for seed in range(4)]
    assert [report.measured for report, _ in measured] == [True, False, False, True]
    method.remove()
    a, b = (getattr(measured[0][0].weights, stream).item() for stream in ("plasticity", "stability"))
    assert b != pytest.approx(1.0)
    streams = []
    for rule in (pcr_core.NoAnchor(), pcr_core.GRPO()):
        plain = PCR(model, granularity="global", rule=rule)
        streams.append(step(model, plain, 1, parts)[1])
        plain.remove()
    expected = {name: a * p + b * (streams[1][name] - p) for name, p in streams[0].items()}
    assert_gradients_close(measured[1][1], expected, 1e-5)


def test_steps_between_take_one_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora()
    method = one_block(model, 2)
    step(model, method, 0)
    calls: list[object] = []
    backward = torch.autograd.backward

    def counted(*args: Any, **options: Any) -> None:
        calls.append(args)
        backward(*args, **options)

    monkeypatch.setattr(torch.autograd, "backward", counted)
    step(model, method, 1)
    method.remove()
    assert len(calls) == 1


def test_a_checkpoint_continues_between_measured_steps() -> None:
    model = lora()
    method = one_block(model, 3)
    runs = [[step(model, method, seed) for seed in range(5)]]
    method.remove()
    method = one_block(model, 3)
    first = [step(model, method, seed) for seed in range(2)]
    state = method.state_dict()
    method.remove()
    method = one_block(model, 3)
    method.load_state_dict(state)
    runs.append(first + [step(model, method, seed) for seed in range(2, 5)])
    method.remove()
    for (one, gradients), (other, again) in zip(*runs, strict=True):
        assert one.measured == other.measured
        assert_gradients_close(again, gradients, 0.0)


def test_what_is_not_finite_is_measured_anew() -> None:
    model = lora()
    method = one_block(model, 3)
    data = batch(n=8)
    logp = data.logp(model)
    bad = torch.full_like(logp, torch.nan)
    method.accumulate_cotangents(logp, bad, bad, group_ids=data.group_ids)
    assert not method.resolve().finite
    assert method.measuring
    method.remove()


def test_what_is_not_finite_in_a_step_between_is_reported() -> None:
    model = lora()
    method = one_block(model, 3)
    assert step(model, method, 0)[0].finite
    data = batch(n=8)
    logp = data.logp(model)
    bad = torch.full_like(logp, torch.nan)
    method.accumulate_cotangents(logp, bad, bad, group_ids=data.group_ids)
    report = method.resolve()
    assert not report.measured
    assert not report.finite
    assert report.nonfinite_blocks() == ("global",)
    assert report.metrics()["pcr/nonfinite_blocks"] == 1
    assert step(model, method, 1)[0].finite
    method.remove()


def test_weights_from_before_there_was_a_stability_gradient_are_not_used_again() -> None:
    """A run starts at its reference, where S = 0 and b is 1 whatever the rule."""
    model = lora()
    method = one_block(model, 3)
    data = batch(n=8)
    logp = data.logp(model)
    plasticity = torch.randn_like(logp)
    method.accumulate_cotangents(logp, plasticity, torch.zeros_like(logp), group_ids=data.group_ids)
    method.resolve()
    assert method.measuring
    assert [step(model, method, seed)[0].measured for seed in range(3)] == [True, False, False]
    method.remove()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"granularity": "tensor"}, "8 blocks"),
        ({"granularity": "global", "blocks": "lora_A"}, "is in no block"),
        ({"granularity": "global", "every": 0}, "expected an integer >= 1"),
        (
            {"granularity": "global", "rule": pcr_core.PCR(alpha="variance", prior=pcr_core.TemporalPrior(0.9))},
            "TemporalPrior shrinks",
        ),
        (
            {"granularity": "global", "rule": pcr_core.PCR(alpha="variance", prior=pcr_core.ShrinkagePrior())},
            "ShrinkagePrior shrinks",
        ),
    ],
)
def test_what_is_not_exact_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PCR(lora(), **{"every": 2, **options})
