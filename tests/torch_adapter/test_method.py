"""`PCR`: accumulation, resolution into .grad, priors, state, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from problems import Batch, batch, tiny_model
from torch import Tensor, nn

import pcr_core
from pcr_torch import PCR


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(model: nn.Module, method: PCR, data: Batch, **options: object) -> Any:
    logp = data.logp(model)
    method.accumulate(logp, data.objective(logp, **options), group_ids=data.group_ids)
    return method.resolve()


def accumulate(model: nn.Module, method: PCR) -> None:
    data = batch()
    logp = data.logp(model)
    method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)


def gradients_of_a_step(model: nn.Module, method: PCR) -> dict[str, Tensor]:
    accumulate(model, method)
    method.resolve()
    found = gradients(model)
    model.zero_grad()
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= rtol * gradient.norm(), name


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


def test_temporal_prior_equals_the_dense_filter_over_steps() -> None:
    model, data = tiny_model("llama", dtype=torch.float64), batch()
    rule = pcr_core.PCR(prior=pcr_core.TemporalPrior(0.7), alpha="variance")
    method = PCR(model, rule=rule, granularity="global")
    names = method.blocks[0].parameters
    state = None
    for step in range(3):
        model.zero_grad()
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).mul_(1 + 0.1 * step)
        logp = data.logp(model)
        objective = data.objective(logp)
        streams = []
        for losses in (objective.plasticity_loss, objective.stability_loss):
            rows = [
                torch.autograd.grad(loss, [model.get_parameter(n) for n in names], retain_graph=True) for loss in losses
            ]
            streams.append(torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]))
        dense = pcr_core.resolve(*streams, group_ids=data.group_ids, rule=rule, state=state)
        state = dense.state
        if step == 1:  # a checkpoint in between changes nothing
            saved = copy.deepcopy(method.state_dict())
            method.remove()
            method = PCR(model, rule=rule, granularity="global")
            method.load_state_dict(saved)
        run(model, method, data)
        update = torch.cat([model.get_parameter(n).grad.reshape(-1) for n in names])  # type: ignore[union-attr]
        assert (update - dense.update).norm() <= 1e-4 * dense.update.norm(), step


def test_a_step_that_is_not_finite_leaves_the_temporal_prior_as_it_was() -> None:
    model, data = tiny_model("llama"), batch()
    method = PCR(model, rule=pcr_core.PCR(alpha="variance", prior=pcr_core.TemporalPrior(0.7)))
    run(model, method, data)
    before = copy.deepcopy(method.state_dict()["prior"])
    hook = model.get_submodule("model.layers.1.mlp.up_proj").register_full_backward_hook(
        lambda module, grad_in, grad_out: (grad_in[0] * math.nan,)
    )
    bad = run(model, method, data)
    hook.remove()
    after = method.state_dict()["prior"]
    assert bad.nonfinite_blocks()
    for stream in ("plasticity", "stability"):
        assert bool(torch.isfinite(after[stream]["variance"]).all())
        for name in bad.nonfinite_blocks():
            assert torch.equal(after[stream]["mean"][name], before[stream]["mean"][name])
    assert run(model, method, data).finite


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
