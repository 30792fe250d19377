"""One evaluation of TRL's losses gives the cotangents that three give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer
from trl_runs import train
from trl_subclasses import ONE_STEP, derived

from pcr_torch.trl import PCRConfig, PCRTrainer
from pcr_torch.trl.separability import SEPARABLE_LOSSES
from pcr_torch.trl.shared_forward import SharedForward

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("same_micro_batches")]


def three_evaluations(trainer: Any, inputs: Any, logp: Tensor, entropies: Tensor) -> list[Tensor]:
    """The whole loss, the reward's (beta = 0) and the KL's (advantages 0): derivatives by logp of each."""
    leaf = logp.detach().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, entropies.detach(), None)
    beta, found = trainer.beta, []
    for coefficient, factor in ((beta, 1.0), (0.0, 1.0), (beta, 0.0)):
        trainer.beta = coefficient
        loss = GRPOTrainer._compute_loss(
            trainer, trainer.model, {**inputs, "advantages": factor * inputs["advantages"].detach()}
        )
        found.append(torch.autograd.grad(loss, leaf)[0])
    del trainer._get_per_token_logps_and_entropies
    trainer.beta = beta
    return found


@pytest.mark.parametrize("loss_type", SEPARABLE_LOSSES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias_correction_kl": False, "importance_sampling_level": "sequence"},
        {"top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.02},
        {"delta": 1.5, "epsilon": 0.01},
    ],
    ids=str,
)
def test_one_evaluation_has_the_cotangents_of_three(
    loss_type: str, options: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second use of a batch, whose ratios are not 1."""
    seen, calls, apart = [], [], SharedForward.streams

    def loss(super_: Any, self: Any, model: Any, inputs: Any) -> Any:
        calls.append((self, inputs))
        return super_(model, inputs)

    def streams(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(apart(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(SharedForward, "streams", streams)
    settings = {"max_steps": 2, "num_iterations": 2, "learning_rate": 0.02, "reference_noise": 0.3, "epsilon_high": 5.0}
    settings["loss_type"] = loss_type
    train(derived(PCRTrainer, _compute_loss=loss), PCRConfig, folder, tmp_path, **settings | options)
    assert len(calls) == 2  # once a micro-batch
    trainer, inputs = calls[1]
    whole, plasticity, stability = three_evaluations(trainer, inputs, seen[1].cut.logp, seen[1].cut.entropies)
    for got, expected in ((seen[1].plasticity, plasticity), (seen[1].stability, stability)):
        assert float((got - expected).norm()) <= 1e-6 * float(expected.norm())
    assert float(stability.norm()) > 1e-3 * float(whole.norm())


def test_equal_rewards_leave_no_plasticity_gradient_at_all(folder: Path, tmp_path: Path) -> None:
    """Not the rounding of a difference, whose direction would be chance."""

    def no_advantages(super_: Any, self: Any, model: Any, inputs: Any) -> Any:
        return super_(model, {**inputs, "advantages": 0 * inputs["advantages"]})

    trainer, _ = train(derived(PCRTrainer, _compute_loss=no_advantages), PCRConfig, folder, tmp_path, **ONE_STEP)
    assert trainer.last_report.metrics()["pcr/plasticity_norm"] == 0
    assert trainer.last_report.metrics()["pcr/stability_norm"] > 0
