"""Trainers derived from PCRTrainer: what they do to the loss counts, or is refused with the reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl_runs import train
from trl_subclasses import ONE_STEP, against_stock, derived, k3, texts

from pcr_torch.trl import PCRConfig, PCRTrainer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("same_micro_batches")]


def test_a_counter_and_an_annealed_epsilon_move_once_a_micro_batch(folder: Path, tmp_path: Path) -> None:
    class Annealed(PCRTrainer):
        counts: ClassVar[Counter[str]] = Counter()

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            self.counts["losses"] += 1
            self.epsilon_high *= 0.9
            self.beta = self.beta * 0.5
            self._metrics["train"]["beta"].append(self.beta)
            return super()._compute_loss(model, inputs)

    trainer, _ = train(Annealed, PCRConfig, folder, tmp_path, gradient_accumulation_steps=2)
    assert trainer.counts["losses"] == 4
    assert trainer.epsilon_high == pytest.approx(0.2 * 0.9**4)
    assert trainer.beta == pytest.approx(0.1 / 16)
    assert [entry["beta"] for entry in trainer.state.log_history[:2]] == pytest.approx([0.0375, 0.009375])


def test_an_annealed_beta_is_stocks(folder: Path, tmp_path: Path) -> None:
    def annealed(super_: Any, self: Any, *args: Any) -> Any:
        self.beta *= 0.5
        return super_(*args)

    assert against_stock(folder, tmp_path, options={"max_steps": 2}, _compute_loss=annealed) <= 1e-5


def in_place(loss: Tensor) -> Tensor:
    loss *= 0.5
    return loss.add_(3.0)


@pytest.mark.parametrize("method", ["compute_loss", "_compute_loss"])
@pytest.mark.parametrize(
    "change",
    [
        lambda loss: 0.5 * loss,
        in_place,
        lambda loss: -loss,
        lambda loss: loss / loss.detach().abs(),
        lambda loss: torch.nan_to_num(loss),
        lambda loss: loss.double(),
    ],
    ids=["half", "in place", "sign", "by its size", "nan_to_num", "double"],
)
def test_what_is_done_to_the_loss_counts(change: Any, method: str, folder: Path, tmp_path: Path) -> None:
    def changed(super_: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(super_(*args, **kwargs))

    assert against_stock(folder, tmp_path, **{method: changed}) <= 1e-6


@pytest.mark.parametrize(
    "leave_out", [lambda loss: 0 * loss, lambda loss: torch.zeros((), requires_grad=True)], ids=["zero", "no graph"]
)
def test_a_step_that_is_left_out_changes_nothing(leave_out: Any, folder: Path, tmp_path: Path) -> None:
    def left_out(super_: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        return leave_out(super_(*args, **kwargs))

    after = []
    for cls, config in ((GRPOTrainer, GRPOConfig), (PCRTrainer, PCRConfig)):
        made = derived(cls, compute_loss=left_out)
        trainer, _ = train(made, config, folder, tmp_path, **ONE_STEP, optim="sgd")
        after.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*after)


def test_a_micro_batch_of_two_is_left_out_as_stock_does(folder: Path, tmp_path: Path) -> None:
    def every_second(super_: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super_(*args, **kwargs)
        return torch.zeros((), requires_grad=True) if self._step % 2 else loss

    assert (
        against_stock(folder, tmp_path, options={"gradient_accumulation_steps": 2}, compute_loss=every_second) <= 1e-6
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda self, loss: loss.detach(), "it has no graph"),
        (lambda self, loss: loss**2, "its KL term is not in proportion to beta"),
    ],
)
def test_what_cannot_be_done_to_a_loss_is_refused(change: Any, message: str, folder: Path, tmp_path: Path) -> None:
    def changed(super_: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(self, super_(*args, **kwargs))

    with pytest.raises(ValueError, match=message):
        train(derived(PCRTrainer, compute_loss=changed), PCRConfig, folder, tmp_path, **ONE_STEP)


def test_a_backward_pass_past_the_accelerator_is_refused(folder: Path, tmp_path: Path) -> None:
    def step(super_: Any, self: Any, model: Any, inputs: Any, *_: Any) -> Any:
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()

    def forgetting(super_: Any, self: Any, model: Any, inputs: Any, *_: Any) -> Any:
        loss = self._compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()

    for method, message in ((step, "self.accelerator.backward"), (forgetting, "does not come from self.compute_loss")):
        with pytest.raises(ValueError, match=message):
            train(derived(PCRTrainer, training_step=method), PCRConfig, folder, tmp_path, **ONE_STEP)


def test_a_training_step_of_its_own_is_heard(folder: Path, tmp_path: Path) -> None:
    def step(super_: Any, self: Any, model: Any, inputs: Any, *_: Any) -> Any:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) * 0.5
        self.accelerator.backward(loss)
        self._step += 1
        return loss.detach()

    assert against_stock(folder, tmp_path, training_step=step) <= 1e-6
    trainer, _ = train(derived(PCRTrainer, training_step=step), PCRConfig, folder, tmp_path, **ONE_STEP)
    assert trainer.last_report is not None


@pytest.mark.parametrize("without_gradients", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["reference first", "policy first"])
def test_a_kl_to_a_second_model_is_stocks(first: bool, without_gradients: bool, folder: Path, tmp_path: Path) -> None:
    def second_kl(super_: Any, self: Any, model: Any, inputs: Any) -> Any:
        loss = None if first else super_(model, inputs)
        with torch.set_grad_enabled(not without_gradients):
            reference = self._get_per_token_logps_and_entropies(self.ref_model, *texts(inputs))[0]
        loss = super_(model, inputs) if first else loss
        logp = self._get_per_token_logps_and_entropies(model, *texts(inputs))[0]
        return loss + self.beta * k3(reference, logp, inputs["completion_mask"])

    assert against_stock(folder, tmp_path, _compute_loss=second_kl) <= 1e-6


def test_the_reference_is_the_model_without_its_adapters(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    def second_kl(super_: Any, self: Any, model: Any, inputs: Any) -> Any:
        loss = super_(model, inputs)
        with model.disable_adapter():
            reference = self._get_per_token_logps_and_entropies(model, *texts(inputs))[0]
        logp = self._get_per_token_logps_and_entropies(model, *texts(inputs))[0]
        return loss + self.beta * k3(reference, logp, inputs["completion_mask"])

    lora = LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    options = {"peft_config": lora, "reference_noise": 0.0, "gradient_checkpointing": False}
    assert against_stock(folder, tmp_path, options=options, _compute_loss=second_kl) <= 1e-6


def test_old_log_probabilities_taken_without_gradients_get_none(folder: Path, tmp_path: Path) -> None:
    def ratio_to_itself(super_: Any, self: Any, model: Any, inputs: Any) -> Any:
        loss = super_(model, inputs)
        with torch.no_grad():
            old = self._get_per_token_logps_and_entropies(model, *texts(inputs))[0]
        logp = self._get_per_token_logps_and_entropies(model, *texts(inputs))[0]
        return loss - ((logp - old).exp() * inputs["advantages"][:, None]).mean()

    assert against_stock(folder, tmp_path, _compute_loss=ratio_to_itself) <= 1e-6
