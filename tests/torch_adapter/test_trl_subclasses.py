"""Trainers derived from PCRTrainer: what they do to loss, texts and rows counts, or is refused with the reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import trl.trainer.grpo_trainer as stock
from test_trl import GROUP, relative_error, train
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from pcr_torch.method import PCR
from pcr_torch.trl import PCRConfig, PCRTrainer
from pcr_torch.trl.separability import SEPARABLE_LOSSES
from pcr_torch.trl.shared_forward import SharedForward

pytestmark = pytest.mark.filterwarnings("ignore")
ONE_STEP = {"max_steps": 1, "reference_noise": 0.3}


@pytest.fixture(autouse=True)
def _same_micro_batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)


def derived(base: Any, **methods: Any) -> Any:
    """A class whose methods get their base's as the first argument."""

    def bound(name: str, method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return method(getattr(super(made, self), name), self, *args, **kwargs)

        return call

    made: Any = type("Derived", (base,), {name: bound(name, method) for name, method in methods.items()})
    return made


def against_stock(folder: Path, out: Path, *, options: dict[str, Any] | None = None, **methods: Any) -> float:
    """How far the plain sum's gradients of a derived trainer are from those of the stock trainer derived alike."""
    settings = ONE_STEP | (options or {})
    _, expected = train(derived(GRPOTrainer, **methods), GRPOConfig, folder, out, **settings)
    _, got = train(derived(PCRTrainer, **methods), PCRConfig, folder, out, rule="grpo", **settings)
    assert len(got.steps) == len(expected.steps)
    return max(relative_error(a, b) for a, b in zip(got.steps, expected.steps, strict=True))


def texts(inputs: Any) -> tuple[Tensor, Tensor, int]:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    return ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1), inputs["completion_ids"].shape[1]


def k3(reference: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    return ((torch.exp(reference - logp) - (reference - logp) - 1) * mask).sum() / mask.sum()


# -- one evaluation, two streams -----------------------------------------------------------------------------------


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


# -- what is done to the loss's value ------------------------------------------------------------------------------


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


# -- which forward pass is asked for -------------------------------------------------------------------------------


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


# -- rows ----------------------------------------------------------------------------------------------------------


def rows_of(inputs: Any, rows: list[int]) -> dict[str, Any]:
    return {k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == 2 * GROUP else v for k, v in inputs.items()}


KEPT = [0, 1, 4, 5]  # two of each prompt
KINDS = {
    "dropped": KEPT,
    "repeated": [0, 0, 1, 1, 4, 4, 5, 5],
    "moved": [4, 5, 6, 7, 0, 1, 2, 3],
    "mixed": [0, 4, 1, 5],
}


@pytest.mark.parametrize(
    ("place", "method", "kind"),
    [
        *(("below", "_generate_and_score_completions", kind) for kind in KINDS),
        ("below", "_prepare_inputs", "dropped"),
        ("below", "_compute_loss", "repeated"),
        ("above", "_generate_and_score_completions", "moved"),
        ("above", "_prepare_inputs", "mixed"),
        ("above", "compute_loss", "dropped"),
        ("above", "_compute_loss", "mixed"),
    ],
)
def test_rows_keep_their_group(
    place: str, method: str, kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = KINDS[kind]

    def changed(super_: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        if "loss" in method:
            return super_(args[0], rows_of(args[1], rows), *args[2:], **kwargs)
        return rows_of(super_(*args, **kwargs), rows)

    seen: list[Any] = []
    accumulate = PCR.accumulate_cotangents

    def watched(self: Any, *args: Any, group_ids: Tensor, **kwargs: Any) -> None:
        seen.append(group_ids.tolist())
        accumulate(self, *args, group_ids=group_ids, **kwargs)

    monkeypatch.setattr(PCR, "accumulate_cotangents", watched)
    below = derived(GRPOTrainer, **{method: changed})
    cls: Any = type("Both", (PCRTrainer, below), {}) if place == "below" else derived(PCRTrainer, **{method: changed})
    train(cls, PCRConfig, folder, tmp_path, **ONE_STEP, rule="grpo")
    (ids,) = seen
    expected = [row // GROUP for row in rows]
    assert [[a == b for b in ids] for a in ids] == [[a == b for b in expected] for a in expected]
