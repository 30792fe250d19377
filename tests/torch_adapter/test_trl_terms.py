"""Losses of a derived trainer: which terms, advantages and forward passes of its own are right, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl_runs import train
from trl_subclasses import ONE_STEP, against_stock, derived, k3, texts

from pcr_torch.trl import PCRConfig, PCRTrainer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("same_micro_batches")]


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (lambda self, logp, entropies, a: 0.1 * logp.mean(), "more than the sum of its reward and its KL term"),
        (lambda self, logp, entropies, a: float(self.beta) * logp.mean(), "more than the sum"),
        (lambda self, logp, entropies, a: self.args.beta * logp.mean(), "more than the sum"),
        (lambda self, logp, entropies, a: 1e-3 * entropies.mean(), "gradient through the entropies"),
        (lambda self, logp, entropies, a: self.beta**2 * logp.mean(), "not in proportion to beta"),
        (lambda self, logp, entropies, a: self.beta * (logp * a).mean(), "depends on the advantages too"),
    ],
)
def test_terms_of_neither_stream_are_refused(term: Any, message: str, folder: Path, tmp_path: Path) -> None:
    def with_term(super_: Any, self: Any, model: Any, inputs: Any) -> Any:
        loss = super_(model, inputs)
        logp, entropies, _ = self._get_per_token_logps_and_entropies(model, *texts(inputs), compute_entropy=True)
        return loss + term(self, logp, entropies, inputs["advantages"][:, None])

    with pytest.raises(ValueError, match=message):
        train(derived(PCRTrainer, _compute_loss=with_term), PCRConfig, folder, tmp_path, **ONE_STEP)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.clamp(-0.5, 0.5),
        lambda a: (a - a.mean()) / (a.std() + 1e-4),
        lambda a: a + 0.3,
        lambda a: a.clamp(min=0),
    ],
    ids=["clipped", "normalised", "moved", "positive"],
)
def test_advantages_may_be_changed_in_the_loss(change: Any, folder: Path, tmp_path: Path) -> None:
    def changed(super_: Any, self: Any, model: Any, inputs: Any) -> Any:
        return super_(model, {**inputs, "advantages": change(inputs["advantages"])})

    assert against_stock(folder, tmp_path, _compute_loss=changed) <= 1e-6


def own_loss(super_: Any, self: Any, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
    """A loss written anew, in evaluation mode."""
    model.eval()
    reference = self._get_per_token_logps_and_entropies(self.ref_model, *texts(inputs))[0].detach()
    logp = self._get_per_token_logps_and_entropies(model, *texts(inputs))[0]
    mask = inputs["completion_mask"]
    reward = ((logp - logp.detach()).exp() * inputs["advantages"][:, None] * mask).sum() / mask.sum()
    return self.beta * k3(reference, logp, mask) - reward


def test_a_loss_without_super_and_in_evaluation_mode_is_stocks(folder: Path, tmp_path: Path) -> None:
    assert against_stock(folder, tmp_path, options={"max_steps": 2}, compute_loss=own_loss) <= 1e-5


@pytest.mark.parametrize("method", ["compute_loss", "_compute_loss"])
def test_a_loss_of_an_own_forward_pass_is_refused(method: str, folder: Path, tmp_path: Path) -> None:
    def own_forward(super_: Any, self: Any, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        ids, mask, _ = texts(inputs)
        return self.beta * model(input_ids=ids, attention_mask=mask).logits.mean()

    with pytest.raises(ValueError, match=r"take log-probabilities from self\._get_per_token_logps_and_entropies"):
        train(derived(PCRTrainer, **{method: own_forward}), PCRConfig, folder, tmp_path, **ONE_STEP)


def test_a_loss_without_a_kl_term_is_refused(folder: Path, tmp_path: Path) -> None:
    def reward_only(super_: Any, self: Any, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        logp = self._get_per_token_logps_and_entropies(model, *texts(inputs))[0]
        return -(logp * inputs["advantages"][:, None]).mean()

    with pytest.raises(ValueError, match=r"no term of it is multiplied by self\.beta"):
        train(derived(PCRTrainer, compute_loss=reward_only), PCRConfig, folder, tmp_path, **ONE_STEP)
