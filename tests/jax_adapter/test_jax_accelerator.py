"""The program that XLA is given for a GPU, counted without one: no loop but that over microbatches."""

from __future__ import annotations

import re
from typing import Any

import optax
import pytest
import tiny

import pcr_core
from pcr_jax import Rollouts, init_state, make_train_step

SIZES = {"small": (8, 12, 1, 2, 5), "more of all": (264, 520, 2, 4, 9)}  # width, hidden, layers, groups, tokens


def lowered(size: str, *, noise: bool, platform: str) -> str:
    width, hidden, layers, groups, length = SIZES[size]
    params = tiny.on_device(tiny.parameters(width=width, hidden=hidden, layers=layers))
    data = tiny.on_device(tiny.rollouts(groups=groups, length=length))
    rollouts, optimizer = Rollouts({"tokens": data.pop("tokens")}, **data), optax.sgd(0.1)
    rule = pcr_core.PCR(alpha="snr") if noise else pcr_core.PCR()
    step: Any = make_train_step(tiny.forward, optimizer, group_size=tiny.GROUP, beta=tiny.BETA, rule=rule)
    program = step.compiled if noise else step.plain
    text = program.trace(init_state(params, optimizer), rollouts).lower(lowering_platforms=(platform,)).as_text()
    return str(text)


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_the_only_loop_on_a_gpu_is_over_microbatches(size: str, noise: bool) -> None:
    text = lowered(size, noise=noise, platform="cuda")
    assert text.count("stablehlo.while") == 1
    assert f"dense<{SIZES[size][3]}> : tensor<i32>" in text  # as many turns as groups


def test_on_a_cpu_responses_are_taken_one_by_one() -> None:
    """So that the tests above do count something: the same step, for another platform."""
    assert lowered("small", noise=True, platform="cpu").count("stablehlo.while") > 1


def test_products_are_formed_by_batched_matrix_products() -> None:
    """The gradients of all responses of a microbatch, one product for each stream and layer."""
    text = lowered("more of all", noise=True, platform="cuda")
    per_response = re.findall(rf"dot_general.*-> tensor<1x{tiny.GROUP}x264x520xf32>", text)
    assert len(per_response) == 2 * SIZES["more of all"][2]
