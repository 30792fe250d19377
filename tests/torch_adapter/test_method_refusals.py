"""What `PCR` refuses: batches, options, states and hooks; and how a step is given up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Batch, batch, tiny_model
from steps import accumulate, assert_same, gradients_of_a_step, run
from torch import Tensor, nn

import pcr_core
from pcr_torch import PCR


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"group_ids": torch.tensor([0, 0])},
            ValueError,
            r"group_ids: expected one id a response.*\(6,\), got \(2,\)",
        ),
        ({"group_ids": torch.zeros(6)}, TypeError, "group_ids: expected integers, got torch.float32"),
        ({"group_ids": torch.tensor([0, 0, 0, 0, 0, 3])}, ValueError, "group 3 has one response.*strata='batch'"),
        ({"plasticity": torch.zeros(6, 4)}, ValueError, r"cotangent: expected logp's shape \(6, 5\), got \(6, 4\)"),
        ({"plasticity": torch.zeros(6, 5, dtype=torch.float64)}, ValueError, "cotangent: expected torch.float32"),
        ({"logp": torch.zeros(6, 5)}, ValueError, "logp: it has no graph"),
        ({"logp": torch.zeros(6, requires_grad=True)}, ValueError, r"logp: expected a tensor \(responses, tokens\)"),
    ],
)
def test_bad_batches_are_refused_by_name(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    model, data = tiny_model("llama"), batch()
    method = PCR(model, noise_every=1)
    logp = data.logp(model)
    objective = data.objective(logp)
    arguments = {
        "logp": logp,
        "plasticity": objective.plasticity_cotangent,
        "stability": objective.stability_cotangent,
        "group_ids": data.group_ids,
    } | change
    with pytest.raises(error, match=message):
        method.accumulate_cotangents(**arguments)
    with pytest.raises(RuntimeError, match="before accumulate"):
        method.resolve()


def test_bad_options_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="norms: expected one of"):
        PCR(model, noise_every=1, norms="ghost")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strata: expected one of"):
        PCR(model, noise_every=1, strata="prompt")  # type: ignore[arg-type]
    for rule in ("pcr", pcr_core.PCR):
        with pytest.raises(TypeError, match=r"rule: expected a rule such as pcr_core\.PCR\(\) or pcr_core\.make_rule"):
            PCR(model, rule=rule)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"norms='fast'.*embed_tokens"):
        PCR(model, noise_every=1, blocks="all", norms="fast")
    assert PCR(model, noise_every=1, blocks="all").norms == "mixed"
    with pytest.raises(ValueError, match="DataParallel copies the model within one process"):
        PCR(nn.DataParallel(model))
    with pytest.raises(TypeError, match=r"objective: expected a pcr_core\.Objective"):
        PCR(model, noise_every=1).accumulate(torch.zeros(2, 2), None, group_ids=torch.zeros(2))  # type: ignore[arg-type]


def test_state_of_other_blocks_is_refused() -> None:
    model = tiny_model("llama")
    state = PCR(model, noise_every=1, granularity="layer").state_dict()
    with pytest.raises(ValueError, match="belongs to 2 other blocks"):
        PCR(model, noise_every=1, granularity="tensor").load_state_dict(state)


def test_batch_strata_allow_groups_of_one() -> None:
    model, data = tiny_model("llama"), batch()
    lonely = Batch(data.tokens, data.mask, torch.arange(6), data.advantages, data.prompt)
    report = run(model, PCR(model, noise_every=1, strata="batch"), lonely)
    assert report.finite
    assert bool((report.statistics.plasticity_var > 0).all())


def test_discard_forgets_what_is_not_in_grad() -> None:
    model = tiny_model("llama")
    method = PCR(model, noise_every=1, rule=pcr_core.GRPO())
    expected = gradients_of_a_step(model, method)
    accumulate(model, method)
    with pytest.raises(RuntimeError, match="between accumulate"):
        method.state_dict()
    method.discard()
    method.state_dict()
    model.zero_grad()
    assert_same(gradients_of_a_step(model, method), expected, rtol=0.0)
    method.remove()


@pytest.mark.parametrize("norms", ["fast", "loop"])
def test_half_a_micro_batch_is_never_resolved(norms: Any) -> None:
    """An error in a backward pass leaves a part of the micro-batch in the totals and in the others' gradients."""
    model = tiny_model("llama")
    method = PCR(model, noise_every=1, rule=pcr_core.GRPO(), norms=norms)
    expected = gradients_of_a_step(model, method)
    accumulate(model, method)
    logp = batch().logp(model)

    def fail(gradient: Tensor) -> None:
        raise MemoryError

    below = model.get_parameter("model.embed_tokens.weight").register_hook(fail)
    with pytest.raises(MemoryError):
        method.accumulate(logp, batch().objective(logp), group_ids=batch().group_ids)
    below.remove()
    for call in (lambda: accumulate(model, method), method.resolve, method.state_dict):
        with pytest.raises(RuntimeError, match="ended within its backward passes"):
            call()
    method.discard()
    model.zero_grad()
    assert_same(gradients_of_a_step(model, method), expected, rtol=0.0)
    method.remove()


@pytest.mark.parametrize("norms", ["fast", "loop"])
def test_hooks_on_parameters_run_or_are_refused(norms: Any) -> None:
    model = tiny_model("llama")
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    handle = weight.register_hook(lambda g: 0 * g)
    method = PCR(model, noise_every=1, rule=pcr_core.GRPO(), norms=norms)
    if norms == "loop":
        assert not gradients_of_a_step(model, method)["model.layers.0.mlp.up_proj.weight"].any()
    else:
        with pytest.raises(ValueError, match="has a hook on its gradient, which the fast path does not run"):
            accumulate(model, method)
    handle.remove()
    model.get_parameter("lm_head.weight").register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="post-accumulate-grad hook"):
        accumulate(model, method)
    method.remove()
