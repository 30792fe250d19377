"""What a subclass of PCRTrainer writes into its batch, and the losses of other models within a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as stock
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer
from trl_runs import GROUP, relative_error, train
from trl_subclasses import ONE_STEP, derived, k3, texts

from pcr_torch.trl import PCRConfig, PCRTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
REUSED = {
    "compute_loss": {"num_iterations": 2, "max_steps": 2},
    "_compute_loss": {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "num_iterations": 2, "max_steps": 4},
}


@pytest.fixture(autouse=True)
def _same_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)


def both(folder: Path, out: Path, *, options: dict[str, Any] | None = None, **methods: Any) -> tuple[Any, Any, float]:
    """Both trainers derived alike, and how far the plain sum's gradients are from the stock trainer's."""
    settings = ONE_STEP | {"optim": "sgd", "learning_rate": 0.05} | (options or {})
    theirs, expected = train(derived(GRPOTrainer, **methods), GRPOConfig, folder, out, **settings)
    mine, got = train(derived(PCRTrainer, **methods), PCRConfig, folder, out, rule="grpo", **settings)
    assert len(got.steps) == len(expected.steps) > 0
    return theirs, mine, max(relative_error(a, b) for a, b in zip(got.steps, expected.steps, strict=True))


# -- what is written stays ---------------------------------------------------------------------------------------


def assigned(inputs: Any) -> None:
    inputs["advantages"] = inputs["advantages"] * 0.5


def in_place(inputs: Any) -> None:
    inputs["advantages"] *= 0.5


def without_gradients(inputs: Any) -> None:
    with torch.no_grad():
        inputs["advantages"].mul_(0.5)


def one_row(inputs: Any) -> None:
    inputs["advantages"][0] = 2.0


def past_autograd(inputs: Any) -> None:
    inputs["advantages"].data[:2] = 2.0


def of_its_own(inputs: Any) -> None:
    """Advantages made anew, from nothing that came with the batch."""
    inputs["advantages"] = torch.linspace(-1, 1, len(inputs["advantages"]))


def another_tensor(inputs: Any) -> None:
    inputs["ref_per_token_logps"] = inputs["ref_per_token_logps"] - 0.1


def another_in_place(inputs: Any) -> None:
    inputs["completion_mask"][:, -1] = 0


def a_count(inputs: Any) -> None:
    inputs["uses"] = inputs.get("uses", 0) + 1
    inputs["ref_per_token_logps"] = inputs["ref_per_token_logps"] - 0.1 * inputs["uses"]


def made_once(inputs: Any) -> None:
    """What is made of the advantages at the first use is taken at every use."""
    inputs.setdefault("clipped", inputs["advantages"].clamp(-0.5, 0.5))
    inputs["advantages"] = inputs["clipped"]


def fewer_rows(inputs: Any) -> None:
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim and len(value) >= 2 * GROUP:
            inputs[name] = value[[0, 1, 4, 5, 6, 7]]


WRITES = [
    assigned, in_place, without_gradients, one_row, past_autograd, of_its_own, another_tensor, another_in_place,
    a_count, made_once, fewer_rows,
]  # fmt: skip


@pytest.mark.parametrize("method", REUSED)
@pytest.mark.parametrize("write", WRITES)
def test_what_a_loss_writes_into_its_batch_is_there_at_its_next_use(
    write: Any, method: str, folder: Path, tmp_path: Path
) -> None:
    def writing(super_: Any, self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        write(inputs)
        return super_(model, inputs, *args, **kwargs)

    theirs, mine, error = both(folder, tmp_path, options=REUSED[method], **{method: writing})
    assert error <= 1e-5
    for expected, got in zip(theirs._buffered_inputs, mine._buffered_inputs, strict=True):
        assert {*got} - {"pcr_group_ids", "pcr_texts"} == {*expected}
        assert not got["advantages"].requires_grad
        for name, value in expected.items():
            assert torch.allclose(got[name], value) if isinstance(value, Tensor) else got[name] == value


def test_a_batch_has_the_keys_of_the_stock_trainers(folder: Path, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def looking(super_: Any, self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({*inputs})
        return super_(model, inputs, *args, **kwargs)

    both(folder, tmp_path, compute_loss=looking)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("value", [None, 1.0])
def test_a_batch_without_advantages_is_refused(value: Any, folder: Path, tmp_path: Path) -> None:
    def without(super_: Any, self: Any, inputs: Any) -> Any:
        return {**super_(inputs), "advantages": value}

    def taken_away(super_: Any, self: Any, inputs: Any) -> Any:
        return {k: v for k, v in super_(inputs).items() if k != "advantages"}

    for method in (without, taken_away):
        with pytest.raises(ValueError, match="the batch has no tensor 'advantages'"):
            train(derived(PCRTrainer, _prepare_inputs=method), PCRConfig, folder, tmp_path, **ONE_STEP)


def test_advantages_that_the_loss_computes_are_heard(folder: Path, tmp_path: Path) -> None:
    def taken_away(super_: Any, self: Any, inputs: Any) -> Any:
        return {k: v for k, v in super_(inputs).items() if k != "advantages"}

    def computed(super_: Any, self: Any, model: Any, inputs: Any) -> Any:
        return super_(model, {**inputs, "advantages": torch.linspace(-1, 1, len(inputs["completion_ids"]))})

    assert both(folder, tmp_path, _prepare_inputs=taken_away, _compute_loss=computed)[2] <= 1e-6


# -- beta is a number ----------------------------------------------------------------------------------------------


def test_beta_may_be_logged_rounded_and_set_to_zero_for_a_term(folder: Path, tmp_path: Path) -> None:
    def two_terms(super_: Any, self: Any, model: Any, inputs: Any) -> Any:
        beta, self.beta = self.beta, 0.0
        json.dumps({"beta": self.beta})
        self.log({"beta": self.beta, "rounded": round(self.beta, 2)})
        self._metrics["train"]["beta"].append(self.beta)
        reward = super_(model, inputs)
        self.beta = 0.75 * beta
        return 0.5 * reward + 0.5 * super_(model, inputs)

    options = {"save_strategy": "steps", "save_steps": 1}
    theirs, mine, error = both(folder, tmp_path, options=options, _compute_loss=two_terms)
    assert error <= 1e-6
    assert mine.beta == theirs.beta == pytest.approx(0.075)
    assert type(mine.beta) is float
    assert [entry.get("beta") for entry in mine.state.log_history] == [e.get("beta") for e in theirs.state.log_history]


# -- other losses --------------------------------------------------------------------------------------------------


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(1, 1)

    def loss(self, inputs: Any, advantages: Tensor) -> Tensor:
        lengths = inputs["completion_mask"].sum(1, keepdim=True).float()
        return (self.value(lengths).squeeze(1) - advantages).square().mean()


def critic_of(trainer: Any) -> Critic:
    if not hasattr(trainer, "critic"):
        torch.manual_seed(5)
        trainer.critic = Critic()
    critic: Critic = trainer.critic
    return critic


@pytest.mark.parametrize("way", ["accelerator", "backward", "included"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_critic_is_trained_within_the_loss(way: str, when: str, folder: Path, tmp_path: Path) -> None:
    def backward(self: Any, inputs: Any) -> None:
        loss = critic_of(self).loss(inputs, inputs["advantages"])
        self.accelerator.backward(loss) if way == "accelerator" else loss.backward()

    def with_critic(super_: Any, self: Any, model: Any, inputs: Any) -> Any:
        if way == "included":
            return super_(model, inputs) + critic_of(self).loss(inputs, inputs["advantages"].detach())
        if when == "before":
            backward(self, inputs)
        loss = super_(model, inputs)
        if when == "after":
            backward(self, inputs)
        return loss

    theirs, mine, error = both(folder, tmp_path, options={"gradient_accumulation_steps": 2}, _compute_loss=with_critic)
    assert error <= 1e-6
    for expected, got in zip(theirs.critic.parameters(), mine.critic.parameters(), strict=True):
        assert torch.allclose(got.grad, expected.grad, rtol=1e-5)


def test_a_critics_step_between_the_loss_and_its_backward_pass(folder: Path, tmp_path: Path) -> None:
    def step(super_: Any, self: Any, model: Any, inputs: Any, *_: Any) -> Any:
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(critic_of(self).loss(inputs, inputs["advantages"]))
        self.accelerator.backward(loss)
        self._step += 1
        return loss.detach()

    assert both(folder, tmp_path, training_step=step)[2] <= 1e-6


def test_backward_passes_left_out_by_a_step_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Of the last micro-batch of a step too, which is where its gradients are resolved."""

    def step(super_: Any, self: Any, model: Any, inputs: Any, *_: Any) -> Any:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self._step += 1
        if self._step not in (2, 3):
            self.accelerator.backward(loss)
        return loss.detach()

    options = {"gradient_accumulation_steps": 2, "max_steps": 3}
    assert both(folder, tmp_path, options=options, training_step=step)[2] <= 1e-6


def early(super_: Any, self: Any, model: Any, inputs: Any) -> Any:
    loss = super_(model, inputs)
    self.accelerator.backward(loss)
    return loss


def shared_with_another_loss(super_: Any, self: Any, model: Any, inputs: Any) -> Any:
    squares = inputs["advantages"].square()
    critic_of(self).loss(inputs, squares).backward()
    return super_(model, {**inputs, "advantages": squares})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (early, "asked for before compute_loss has returned"),
        (shared_with_another_loss, "a backward pass of another loss has freed a part of its graph"),
        (lambda super_, self, model, inputs: super_(model, inputs).item(), "compute_loss returned a float"),
        (lambda super_, self, model, inputs: None, "compute_loss returned nothing"),
        (lambda super_, self, model, inputs: (super_(model, inputs), {}), "compute_loss returned a tuple"),
        (lambda super_, self, model, inputs: {"loss": super_(model, inputs)}, "compute_loss returned a dict"),
        (lambda super_, self, model, inputs: super_(model, inputs) * torch.ones(8), r"a tensor of shape \(8,\)"),
    ],
)
def test_what_is_no_loss_is_refused_with_the_reason(method: Any, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(derived(PCRTrainer, _compute_loss=method), PCRConfig, folder, tmp_path, **ONE_STEP)


# -- classes on both sides -----------------------------------------------------------------------------------------


def passed_on(super_: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    return super_(*args, **kwargs)


def smaller(super_: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    logp, entropies, auxiliary = super_(*args, **kwargs)
    return 0.9 * logp, entropies, auxiliary


SIGNATURES = {
    "_get_per_token_logps_and_entropies": smaller,
    **dict.fromkeys(("_compute_loss", "compute_loss", "_prepare_inputs", "training_step"), passed_on),
    **dict.fromkeys(("_generate_and_score_completions", "_generate"), passed_on),
}


@pytest.mark.parametrize("place", ["below", "above"])
def test_signatures_that_say_nothing(place: str, folder: Path, tmp_path: Path) -> None:
    below = derived(GRPOTrainer, **SIGNATURES)
    _, expected = train(below, GRPOConfig, folder, tmp_path, **ONE_STEP)
    mine = type("Both", (PCRTrainer, below), {}) if place == "below" else derived(PCRTrainer, **SIGNATURES)
    _, got = train(mine, PCRConfig, folder, tmp_path, rule="grpo", **ONE_STEP)
    assert relative_error(got.steps[0], expected.steps[0]) <= 1e-6


def test_every_argument_may_be_given_by_place(folder: Path, tmp_path: Path) -> None:
    def by_place(super_: Any, self: Any, model: Any, inputs: Any) -> Any:
        reference = inputs["ref_per_token_logps"]
        logp, entropies, _ = self._get_per_token_logps_and_entropies(model, *texts(inputs), None, True)
        assert not entropies.isnan().any()
        return super_(model, inputs) + self.beta * k3(reference, logp, inputs["completion_mask"])

    assert both(folder, tmp_path, _compute_loss=by_place)[2] <= 1e-6


# -- outside of train() --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_steps_and_losses_outside_of_training_are_refused(own: bool, folder: Path, tmp_path: Path) -> None:
    def step(super_: Any, self: Any, model: Any, inputs: Any, *_: Any) -> Any:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        self._step += 1
        return loss.detach()

    methods = {"training_step": step} if own else {}
    trainer, _ = train(derived(PCRTrainer, **methods), PCRConfig, folder, tmp_path, **ONE_STEP)
    batch = trainer._buffered_inputs[0]
    for name in ("training_step", "compute_loss"):
        with pytest.raises(RuntimeError, match=rf"{name} outside of train\(\): .*use pcr_torch\.PCR in a loop"):
            getattr(trainer, name)(trainer.model, batch)
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, batch).isfinite()
    trainer.train()  # and it goes on as before
    assert trainer.last_report is not None
