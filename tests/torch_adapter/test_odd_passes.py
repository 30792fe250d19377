"""Dropout, checkpointing and further forward passes around `accumulate`: right, or refused with the reason."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import BOTH, RULE, assert_right
from problems import batch, tiny_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from pcr_torch import PCR


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_dropout_with_checkpointing(reentrant: bool, autocast: bool) -> None:
    """The recomputation must draw the same masks, in both backward passes."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    )
    model.train()
    data = batch()

    def pull(norms: Any) -> tuple[Any, dict[str, Tensor]]:
        method = PCR(model, norms=norms, rule=RULE)  # type: ignore[arg-type]
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logp = data.logp(model)  # type: ignore[arg-type]
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
        report = method.resolve()
        method.remove()
        return report, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, expected = pull("loop")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        report, got = pull("fast")
    tolerance = 0.03 if autocast else 1e-4
    torch.testing.assert_close(
        report.statistics.plasticity_var, plain.statistics.plasticity_var, rtol=tolerance, atol=0.0
    )
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= tolerance * gradient.norm(), name


@BOTH
def test_forward_passes_between_logp_and_accumulate_change_nothing(norms: Any) -> None:
    model, data, other = tiny_model("llama"), batch(), batch(n=4, length=7, seed=9)
    method = PCR(model, norms=norms, rule=RULE)
    logp = data.logp(model)
    with torch.no_grad():
        other.logp(model)
    model.eval()
    other.logp(model)
    model.train()
    assert_right(method, logp, data.objective(logp), data.group_ids)


def test_reentrant_checkpointing_is_refused_in_the_loop() -> None:
    """By torch itself: this kind of checkpointing has no gradients but those of backward()."""
    model, data = tiny_model("llama"), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
        model.train()
        method = PCR(model, noise_every=1, norms="loop")
        logp = data.logp(model)
        with pytest.raises(RuntimeError, match="use_reentrant"):
            method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
    with pytest.raises(RuntimeError, match="discard"):
        method.resolve()
