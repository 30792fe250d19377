"""In which steps the noise is measured, what that does to the model, and that a checkpoint knows."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from problems import batch, tiny_model
from steps import accumulate, gradients
from torch import nn

import pcr_core
from pcr_torch import PCR


def paths(model: nn.Module, method: PCR, steps: int) -> list[str]:
    found = []
    for _ in range(steps):
        model.zero_grad()
        accumulate(model, method)
        found.append(method.resolve().path)
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"noise_every": 3}, ["fast", "autograd", "autograd"] * 2),
        ({"noise_every": 1}, ["fast"] * 6),
        ({"noise_every": 0}, ["autograd"] * 6),
        ({}, ["fast", *["autograd"] * 5]),
        ({"rule": pcr_core.PCR(alpha="snr")}, ["fast"] * 6),
        ({"rule": pcr_core.GRPO(), "noise_every": 2, "norms": "loop"}, ["loop", "autograd"] * 3),
    ],
)
def test_every_so_many_steps(options: dict[str, Any], expected: list[str]) -> None:
    model = tiny_model("llama")
    assert paths(model, PCR(model, **options), 6) == expected


def test_the_default_measures_every_tenth_step() -> None:
    model = tiny_model("llama")
    assert [k for k, path in enumerate(paths(model, PCR(model), 21)) if path == "fast"] == [0, 10, 20]


def test_layers_are_probed_in_steps_that_measure_only() -> None:
    model: Any = tiny_model("llama")
    method = PCR(model, noise_every=2)
    layer = model.model.layers[0].mlp.up_proj
    seen = []
    for _ in range(4):
        seen.append("forward" in vars(layer))
        paths(model, method, 1)
    assert seen == [True, False, True, False]


def test_a_resumed_run_measures_when_the_other_would_have(tmp_path: Any) -> None:
    model = tiny_model("llama")
    method = PCR(model, noise_every=3)
    paths(model, method, 2)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    expected = paths(model, method, 4), gradients(model)
    again = PCR(model, noise_every=3)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    assert paths(model, again, 4) == expected[0] == ["autograd", "fast", "autograd", "autograd"]
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in gradients(model).items())


def test_what_would_be_slow_is_left_out_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    small = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**small, **heads))
    with caplog.at_level(logging.INFO, "pcr_torch"):
        assert paths(model, PCR(model), 2) == ["autograd", "autograd"]
    assert len([r for r in caplog.records if "the noise of the gradients is not measured" in r.message]) == 1
    assert paths(model, PCR(model, noise_every=2), 2) == ["loop", "autograd"]


def test_a_group_of_one_response_stops_the_meter_unless_the_noise_is_asked_for() -> None:
    model, data = tiny_model("llama"), batch()

    def step(method: PCR) -> str:
        logp = data.logp(model)
        method.accumulate(logp, data.objective(logp), group_ids=torch.arange(6))
        return method.resolve().path

    assert step(PCR(model)) == "autograd"
    with pytest.raises(ValueError, match="has one response, which carries no information on the variance"):
        step(PCR(model, noise_every=5))


def test_log_probabilities_from_before_the_probes_are_measured_in_the_next_step() -> None:
    model, data = tiny_model("llama"), batch()
    early = data.logp(model)
    method = PCR(model)
    method.accumulate(early, data.objective(early), group_ids=data.group_ids)
    assert method.resolve().path == "autograd"
    assert paths(model, method, 2) == ["fast", "autograd"]


@pytest.mark.parametrize("every", [-1, True, 1.5, "3"])
def test_what_is_no_number_of_steps_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match="noise_every: expected an integer >= 0"):
        PCR(tiny_model("llama"), noise_every=every)


@pytest.mark.parametrize("every", [0, 2])
def test_a_rule_that_needs_the_noise_gets_it_in_every_step(every: int) -> None:
    with pytest.raises(ValueError, match=r"noise_every=\d: .*reads the noise of the gradients in every step"):
        PCR(tiny_model("llama"), rule=pcr_core.PCR.paper(), noise_every=every)
