"""`PCR` with the temporal prior is the dense filter over steps, and waits where a step is not finite."""

from __future__ import annotations

import copy
import math

import torch
from problems import batch, tiny_model
from steps import run

import pcr_core
from pcr_torch import PCR


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
