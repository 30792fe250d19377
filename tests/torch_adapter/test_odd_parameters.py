"""Parameters that are frozen, thawed, not used, or experts of a mixture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BOTH, RULE, Branch, Routed, Small, assert_batch_right, names_of
from problems import batch, tiny_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import pcr_core
from pcr_torch import PCR


@BOTH
def test_the_lower_half_frozen(norms: Any) -> None:
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0." not in name and "embed" not in name)
    method = PCR(model, norms=norms, rule=RULE)
    assert len(names_of(method)) == 3
    assert_batch_right(method, batch())
    assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())


@BOTH
def test_a_frozen_bias_inside_a_probed_layer(norms: Any) -> None:
    model = Small()
    bias = model.layers[0].bias
    assert isinstance(bias, nn.Parameter)
    bias.requires_grad_(False)
    method = PCR(model, blocks="layers", norms=norms, rule=RULE)
    assert "layers.0.bias" not in names_of(method)
    assert_batch_right(method, batch())
    assert bias.grad is None


@BOTH
def test_frozen_and_thawed_after_PCR_was_made(norms: Any) -> None:
    """A block's parameter: refused. Any other: as autograd has it."""
    model, data = Small(), batch()
    model.embed.requires_grad_(False)
    method = PCR(model, blocks=r"layers.*weight", norms=norms, rule=RULE)
    model.embed.requires_grad_(True)
    model.head.requires_grad_(False)
    assert_batch_right(method, data)
    assert model.head.weight.grad is None
    got = model.embed.weight.grad
    logp = data.logp(model)
    objective = data.objective(logp)
    total = (objective.plasticity_loss + objective.stability_loss).sum()
    torch.testing.assert_close(got, torch.autograd.grad(total, [model.embed.weight])[0])
    model.layers[1].requires_grad_(False)
    logp = data.logp(model)
    with pytest.raises(ValueError, match=r"layers\.1\.weight is in a block and was frozen after PCR"):
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)


@BOTH
def test_a_branch_not_taken(norms: Any) -> None:
    """In one micro-batch: the other counts alone. In none of them: no gradient, as after a plain backward."""
    branch = Branch()
    model, data = Small(branch), batch()
    method = PCR(model, noise_every=1, blocks=r"yes.weight|no.weight", norms=norms, rule=pcr_core.GRPO())
    assert_batch_right(method, data)
    assert branch.no.weight.grad is None
    (index,) = [b for b, block in enumerate(method.blocks) if block.name == "layers.0.no.weight"]
    expected = []
    for taken in (True, False):
        branch.taken = taken
        model.zero_grad()
        logp = data.logp(model)
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
        alone = method.resolve()
        weight = branch.yes.weight if taken else branch.no.weight
        assert weight.grad is not None
        expected.append((weight.grad.clone(), alone.statistics.plasticity_var))
    model.zero_grad()
    for taken in (True, False):
        branch.taken = taken
        logp = data.logp(model)
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
    report = method.resolve()
    assert report.finite
    torch.testing.assert_close(branch.yes.weight.grad, expected[0][0])
    torch.testing.assert_close(branch.no.weight.grad, expected[1][0])
    assert expected[0][1][index] == 0
    torch.testing.assert_close(report.statistics.plasticity_var, expected[0][1] + expected[1][1])


def test_routed_linear_experts_are_measured_by_the_owners_of_their_tokens() -> None:
    model, data = Small(Routed()), batch()
    method = PCR(model, norms="fast", rule=RULE)
    assert [name for name in names_of(method) if "router" in name] == []
    assert_batch_right(method, data)
    idle = model.get_parameter("layers.0.experts.2.weight")
    assert idle.grad is None
    assert model.get_parameter("layers.0.router.weight").grad is not None


def test_fused_experts_of_transformers_take_the_loop() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=31, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1, num_local_experts=6, num_experts_per_tok=1,
                           router_jitter_noise=0.0)  # fmt: skip
    model, data = MixtralForCausalLM(config), batch()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
        router = next(m for name, m in model.named_modules() if name.endswith("mlp.gate"))
        router.weight[4:] = 0  # a score of 0 among random ones; the last expert loses every tie
    method = PCR(model, rule=RULE)  # type: ignore[arg-type]
    assert method.norms == "loop"
    assert all(".experts." in name for name in names_of(method)), "the router is not a block"
    assert_batch_right(method, data)
    idle = [(p.grad == 0).flatten(1).all(1) for p in map(model.get_parameter, names_of(method))]  # type: ignore[union-attr]
    assert all(bool(experts.any()) and not bool(experts.all()) for experts in idle), "one expert must be idle"
