"""`PCR`: accumulation, resolution into .grad, reports."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from problems import Batch, batch, tiny_model
from steps import assert_same, gradients, run

import pcr_core
from pcr_torch import PCR


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("norms", ["fast", "loop"])
def test_sum_rule_gives_the_ordinary_gradient_everywhere(architecture: str, norms: Any) -> None:
    model, data = tiny_model(architecture), batch()
    logp = data.logp(model)
    objective = data.objective(logp)
    (objective.plasticity_loss + objective.stability_loss).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    run(model, PCR(model, noise_every=1, rule=pcr_core.GRPO(), norms=norms), data)
    assert_same(gradients(model), expected)


def test_other_parameters_take_the_sum_and_blocks_the_weighted_sum() -> None:
    model, data = tiny_model("llama"), batch()
    run(model, PCR(model, noise_every=1, rule=pcr_core.GRPO()), data)
    plain = gradients(model)
    model.zero_grad()
    report = run(model, PCR(model, rule=pcr_core.PCR(alpha=1.0)), data)
    mine = gradients(model)
    in_blocks = {name for block in report.blocks for name in block.parameters}
    others = plain.keys() - in_blocks
    assert_same({name: mine[name] for name in others}, {name: plain[name] for name in others})
    assert bool(report.weights.conflict.any()), "the problem must have a conflict, or this shows nothing"
    for block, conflict in zip(report.blocks, report.weights.conflict.tolist(), strict=True):
        same = torch.allclose(mine[block.name], plain[block.name], rtol=1e-5, atol=1e-9)
        assert same != conflict


@pytest.mark.parametrize(("lora", "blocks", "norms"), [(True, "lora_", "fast"), (False, "all", "loop")])
def test_a_run_that_begins_at_its_reference_begins(lora: bool, blocks: str, norms: Any) -> None:
    """The blocks hold all that is trained and S is 0, which is the shortest combination; the step is P's."""
    model, data = tiny_model("llama", lora=lora), batch()
    method = PCR(model, noise_every=1, blocks=blocks, rule=pcr_core.MGDA(), norms=norms)
    steps = {}
    for rule in (pcr_core.GRPO(), pcr_core.MGDA()):
        method.rule = rule
        logp = data.logp(model)
        here = logp.detach()
        objective = pcr_core.grpo_objective(logp, here, here, data.advantages, data.mask, beta=0.1)
        method.accumulate(logp, objective, group_ids=data.group_ids)
        report = method.resolve()
        assert not report.statistics.stability_sq.any()
        assert report.metrics()["pcr/removed"] == 0
        steps[rule] = gradients(model)
        model.zero_grad()
    assert all(bool(gradient.any()) for gradient in steps[pcr_core.GRPO()].values())
    assert_same(steps[pcr_core.MGDA()], steps[pcr_core.GRPO()], rtol=0)


@pytest.mark.parametrize("rule", [pcr_core.GRPO(), pcr_core.PCR(prior=pcr_core.TemporalPrior())], ids=str)
def test_an_update_beyond_half_precision_is_reported(rule: pcr_core.Rule) -> None:
    """Totals of float16 parameters are float32 and finite; what stands in .grad is not, in some of the blocks."""
    model, data = tiny_model("llama", dtype=torch.float16), batch()
    method = PCR(model, rule=rule)
    for _ in range(4):
        logp = data.logp(model)
        many = torch.full_like(logp, 5e3)
        method.accumulate_cotangents(logp, many, many, group_ids=data.group_ids)
    report = method.resolve()
    written = [bool(model.get_parameter(block.name).grad.isfinite().all()) for block in report.blocks]  # type: ignore[union-attr]
    assert report.weights.finite.tolist() == written
    assert set(written) == {True, False}
    assert torch.isfinite(report.statistics.plasticity_sq).all()
    assert report.metrics()["pcr/nonfinite_blocks"] == written.count(False)


@pytest.mark.parametrize("norms", ["fast", "loop"])
def test_micro_batches_of_whole_groups_equal_one_batch(norms: Any) -> None:
    model, data = tiny_model("llama"), batch()
    method = PCR(model, noise_every=1, norms=norms)
    whole = run(model, method, data, normalization="dapo")
    expected = gradients(model)
    model.zero_grad()
    tokens = float(data.mask.sum())
    generator = torch.Generator().manual_seed(5)
    noise = [s * torch.randn(data.mask.shape, generator=generator) for s in (0.2, 0.5)]
    for rows in ([0, 2, 3, 4], [1, 5]):
        part = data.rows(rows)
        logp = part.logp(model)
        objective = pcr_core.grpo_objective(
            logp,
            logp.detach() + noise[0][rows],
            logp.detach() + noise[1][rows],
            part.advantages,
            part.mask,
            beta=0.1,
            normalization="dapo",
            normalizer=tokens,
        )
        method.accumulate(logp, objective, group_ids=part.group_ids)
    parts = method.resolve()
    for name in ("plasticity_sq", "dot", "plasticity_var", "stability_var", "covariance"):
        scale = whole.statistics.plasticity_sq.max()
        torch.testing.assert_close(
            getattr(parts.statistics, name), getattr(whole.statistics, name), rtol=1e-5, atol=float(1e-6 * scale)
        )
    assert_same(gradients(model), expected, rtol=1e-4)


def test_group_ids_may_be_any_integers_in_any_order() -> None:
    model, data = tiny_model("llama"), batch()
    method = PCR(model, noise_every=1)
    one = run(model, method, data)
    renamed = Batch(data.tokens, data.mask, 1000 - data.group_ids.to(torch.int32), data.advantages, data.prompt)
    other = run(model, method, renamed)
    torch.testing.assert_close(one.statistics.plasticity_var, other.statistics.plasticity_var)


def test_streams_from_different_forward_passes() -> None:
    """A stability loss on other data: no shared noise, and each stream as if it were alone."""
    model, data, replay = tiny_model("llama"), batch(), batch(n=4, length=7, seed=9)
    method = PCR(model, noise_every=1)
    logp = data.logp(model)
    plasticity = data.objective(logp).plasticity_cotangent
    method.accumulate_plasticity(logp, plasticity, group_ids=data.group_ids)
    logp = replay.logp(model)
    cross_entropy = -0.1 * replay.mask / replay.mask.sum()
    method.accumulate_stability(logp, cross_entropy, group_ids=replay.group_ids)
    report = method.resolve()
    mine = gradients(model)
    assert bool((report.statistics.covariance == 0).all())

    model.zero_grad()
    logp = replay.logp(model)
    (cross_entropy * logp).sum().backward()
    s = gradients(model)
    expected = torch.stack([s[block.name].double().square().sum() for block in report.blocks])
    torch.testing.assert_close(report.statistics.stability_sq, expected, rtol=1e-5, atol=0.0)
    outside = "model.embed_tokens.weight"
    model.zero_grad()
    logp = data.logp(model)
    (plasticity.detach() * logp).sum().backward()
    torch.testing.assert_close(mine[outside], gradients(model)[outside] + s[outside], rtol=1e-4, atol=1e-7)


def test_resolve_adds_to_gradients_that_are_there() -> None:
    model, data = tiny_model("llama"), batch()
    method = PCR(model, noise_every=1)
    run(model, method, data)
    alone = gradients(model)
    model.zero_grad()
    extra = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = extra[name].clone()
    run(model, method, data)
    assert_same(gradients(model), {name: g + extra[name] for name, g in alone.items()})


@pytest.mark.parametrize("norms", ["fast", "loop"])
def test_non_finite_gradients_stay_so_and_are_named(norms: Any) -> None:
    """A NaN that reaches one layer only: its blocks are NaN and flagged, the others' statistics stay finite."""
    model, data = tiny_model("llama"), batch()
    method = PCR(model, noise_every=1, norms=norms)
    hook = model.get_submodule("model.layers.0.mlp.up_proj").register_full_backward_hook(
        lambda module, grad_in, grad_out: (grad_in[0] * math.nan,)
    )
    clean = PCR(copy.deepcopy(tiny_model("llama")), noise_every=1, norms=norms)
    reference = run(clean.model, clean, data)
    report = run(model, method, data)
    hook.remove()
    assert report.finite  # the poison lies below every MLP weight
    assert not torch.isfinite(model.get_parameter("model.embed_tokens.weight").grad).all()  # type: ignore[arg-type]
    torch.testing.assert_close(report.statistics.dot, reference.statistics.dot)

    model.zero_grad()
    hook = model.get_submodule("model.layers.1.mlp.up_proj").register_full_backward_hook(
        lambda module, grad_in, grad_out: (grad_in[0] * math.nan,)
    )
    report = run(model, method, data)
    hook.remove()
    assert not report.finite
    assert report.nonfinite_blocks() == tuple(f"model.layers.0.mlp.{m}_proj.weight" for m in ("gate", "up", "down"))
    for block, finite in zip(report.blocks, report.weights.finite.tolist(), strict=True):
        gradient = model.get_parameter(block.name).grad
        assert gradient is not None
        assert bool(torch.isfinite(gradient).all()) == finite, block.name
    assert report.metrics()["pcr/nonfinite_blocks"] == 3


def test_lora_at_initialisation_is_harmless() -> None:
    """B = 0 makes the gradient of A exactly zero: nothing to project on."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["up_proj"]))  # type: ignore[arg-type]
    report = run(model, PCR(model, noise_every=1), batch())
    assert report.finite
    a_blocks = [i for i, block in enumerate(report.blocks) if block.family.endswith("lora_A")]
    assert report.statistics.stability_sq[a_blocks].tolist() == [0.0, 0.0]
    assert report.weights.stability[a_blocks].tolist() == [1.0, 1.0]


def test_outside_accumulate_the_model_is_as_before() -> None:
    model, data = tiny_model("gpt2"), batch()
    data.logp(model).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    method = PCR(model, noise_every=1, norms="fast")
    data.logp(model).sum().backward()
    assert_same(gradients(model), expected, rtol=1e-6)
    with torch.no_grad():
        data.logp(model)
    method.remove()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_optimizers_step_on_the_update() -> None:
    for make in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor):
        model = tiny_model("llama")
        optimizer = make(model.parameters(), lr=1e-2)
        before = model.get_parameter("model.layers.0.mlp.up_proj.weight").detach().clone()
        run(model, PCR(model, noise_every=1), batch())
        optimizer.step()
        assert not torch.equal(before, model.get_parameter("model.layers.0.mlp.up_proj.weight"))


def test_report_metrics() -> None:
    model = tiny_model("llama")
    report = run(model, PCR(model, noise_every=1), batch())
    metrics = report.metrics()
    assert metrics["pcr/conflict_rate"] == pytest.approx(float(report.weights.conflict.double().mean()))
    assert metrics["pcr/plasticity_norm"] == pytest.approx(float(report.statistics.plasticity_sq.sum().sqrt()))
    layers = report.layer_metrics()
    assert {key.split("/")[1] for key in layers} == {"layer_00", "layer_01"}
    assert len(layers) == 2 * len(metrics)
