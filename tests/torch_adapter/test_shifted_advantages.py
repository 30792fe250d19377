"""The baseline of `PCR`: from the norms of responses' gradients, used from the next step on, kept in checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import Batch, batch, tiny_model
from steps import gradients
from torch import Tensor, nn

import pcr_core
from pcr_torch import PCR
from pcr_torch.report import Report

WEIGHT = torch.tensor([0.5, 1.0, 2.0, 1.5, 1.0, 0.25])


def step(model: nn.Module, method: PCR, seed: int = 1, weight: Tensor | None = None, apart: bool = False) -> Report:
    """On policy but for the reference; `apart`: each group in a micro-batch of its own."""
    data = rewarded(seed)
    applied = method.shifted(data.advantages, weight)
    ids = data.group_ids.unique() if apart else [data.group_ids]
    for rows in [(data.group_ids == q).nonzero().flatten().tolist() for q in ids]:
        part = replace(data, advantages=applied).rows(rows)
        logp = part.logp(model)
        h = None if weight is None else weight[rows]
        method.accumulate(logp, objective(part, logp), group_ids=part.group_ids, advantages=part.advantages, weight=h)
    return method.resolve()


def rewarded(seed: int) -> Batch:
    """Advantages well above zero, which call for a shift."""
    data = batch(seed=seed)
    return replace(data, advantages=data.advantages + 2)


def objective(data: Batch, logp: Tensor) -> pcr_core.Objective[Tensor]:
    reference = logp.detach() - 0.3
    return pcr_core.grpo_objective(
        logp, logp.detach(), reference, data.advantages, data.mask, beta=0.1, normalization="dr_grpo", normalizer=30.0
    )


def norms(model: nn.Module, names: list[str], seed: int) -> tuple[Tensor, Batch]:
    """|y_i|^2 by differentiation of each response's log-likelihood over 30."""
    data = rewarded(seed)
    found = []
    for row in (data.logp(model) * data.mask / 30).sum(1):
        parts = torch.autograd.grad(row, [model.get_parameter(name) for name in names], retain_graph=True)
        found.append(sum(float((part.double() ** 2).sum()) for part in parts))
    return torch.tensor(found, dtype=torch.float64), data


@pytest.mark.parametrize("way", ["fast", "loop"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["even", "weighted"])
@pytest.mark.parametrize("apart", [False, True], ids=["whole", "micro-batches"])
def test_b_is_that_of_differentiated_responses(way: Any, weight: Tensor | None, apart: bool) -> None:
    model = tiny_model("llama")
    method = PCR(model, rule=pcr_core.GRPO(), noise_every=1, norms=way, baseline=1.0, baseline_memory=0.5)
    sums = None
    for seed in (1, 2, 3):
        before = method.shift
        report = step(model, method, seed, weight, apart)
        y_sq, data = norms(model, [n for b in report.blocks for n in b.parameters], seed)
        a = data.advantages.double()
        now = pcr_core.baseline_sums(a**2 * y_sq, a, group_ids=data.group_ids, weight=weight)
        sums = now if sums is None else pcr_core.update_baseline_sums(sums, now, memory=0.5)
        assert report.baseline is not None
        assert report.baseline.applied == before
        assert report.baseline.reduction == pytest.approx(float(pcr_core.variance_reduction(now, before)), rel=1e-4)
        assert method.shift == pytest.approx(float(pcr_core.estimate_baseline(sums).shift), rel=1e-4)
    assert method.shift != 0, "the problem must call for a shift, or this shows nothing"
    assert {"pcr/baseline", "pcr/baseline_reduction"} <= report.metrics().keys()


@pytest.mark.parametrize("rule", [pcr_core.GRPO(), pcr_core.PCR(), pcr_core.PCR(alpha="snr")], ids=repr)
def test_it_works_with_every_rule_and_between_measurements(rule: Any) -> None:
    model = tiny_model("llama")
    needs = pcr_core.needs_noise(rule)
    method = PCR(model, rule=rule, noise_every=1 if needs else 2, baseline=0.5)
    reports = [step(model, method, seed) for seed in (1, 2, 3, 4)]
    reductions = [report.baseline.reduction is None for report in reports if report.baseline]
    assert reductions == ([False] * 4 if needs else [False, True, False, True])
    shifts = [report.baseline.applied for report in reports if report.baseline]
    assert shifts[0] == 0
    assert shifts[1] != 0
    assert needs or shifts[1] == shifts[2]


def test_the_first_update_is_that_without_and_later_ones_of_shifted_advantages() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    method, plain = PCR(model, noise_every=1, baseline=0.5), PCR(other, noise_every=1)
    for seed in (1, 2):
        b = method.shift
        model.zero_grad()
        other.zero_grad()
        step(model, method, seed)
        data = rewarded(seed)
        data, logp = replace(data, advantages=data.advantages - b), data.logp(other)
        plain.accumulate(logp, objective(data, logp), group_ids=data.group_ids)
        plain.resolve()
        mine = gradients(model)
        assert all(torch.equal(mine[name], g) for name, g in gradients(other).items())
    assert b != 0


def test_a_resumed_run_is_the_other_bit_for_bit(tmp_path: Any) -> None:
    model = tiny_model("llama")
    method = PCR(model, noise_every=2, baseline=0.5, baseline_memory=0.7)
    for seed in (1, 2, 3):
        step(model, method, seed)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    other = tiny_model("llama")
    again = PCR(other, noise_every=2, baseline=0.5, baseline_memory=0.7)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.shift == method.shift != 0
    for seed in (4, 5):
        assert step(model, method, seed).baseline == step(other, again, seed).baseline
    assert again.shift == method.shift
    PCR(tiny_model("llama")).load_state_dict(method.state_dict())  # a run without a baseline does without


def test_a_share_of_it() -> None:
    shifts = []
    for share in (1.0, 0.25):
        model = tiny_model("llama")
        method = PCR(model, noise_every=1, baseline=share)
        step(model, method)
        shifts.append(method.shift)
    assert shifts[1] == pytest.approx(0.25 * shifts[0])
    assert shifts[0] != 0


def test_what_was_discarded_is_forgotten() -> None:
    shifts = []
    for interrupted in (True, False):
        model, data = tiny_model("llama"), rewarded(7)
        method = PCR(model, noise_every=1, baseline=0.5)
        if interrupted:
            logp = data.logp(model)
            method.accumulate(logp, objective(data, logp), group_ids=data.group_ids, advantages=data.advantages)
            method.discard()
        step(model, method, 1)
        shifts.append(method.shift)
    assert shifts[0] == shifts[1] != 0


def test_misuse_is_named() -> None:
    model, data = tiny_model("llama"), batch()
    method = PCR(model, noise_every=1, baseline=0.9)
    logp = data.logp(model)
    with pytest.raises(ValueError, match=r"baseline: accumulate\(\) needs the advantages"):
        method.accumulate(logp, objective(data, logp), group_ids=data.group_ids)
    with pytest.raises(ValueError, match="advantages: expected one a response"):
        method.accumulate(logp, objective(data, logp), group_ids=data.group_ids, advantages=torch.ones(3))
    step(model, method)
    logp = data.logp(model)
    with pytest.raises(ValueError, match="shifted"):  # they were not, in this step
        method.accumulate(logp, objective(data, logp), group_ids=data.group_ids, advantages=data.advantages)
    with pytest.raises(ValueError, match="noise_every=0: the baseline"):
        PCR(model, noise_every=0, baseline=0.9)
    for value in (0.0, -1.0, 1.1, True, "0.9"):
        with pytest.raises(ValueError, match="baseline: expected the share"):
            PCR(model, baseline=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="baseline_memory: expected a number in"):
        PCR(model, baseline=1.0, baseline_memory=1.0)
    assert PCR(model).shift == 0
    assert PCR(model).shifted(data.advantages) is data.advantages
