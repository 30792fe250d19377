"""What PCRTrainer does to the model: its layers' forwards come back, and checkpointing hides no rows."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as stock
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_runs import GROUP, relative_error, reward, train

from pcr_torch.trl import PCRConfig, PCRTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
ONE_STEP: dict[str, Any] = {"max_steps": 1, "reference_noise": 0.3}


@pytest.fixture(autouse=True)
def _same_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)


def trainer_of(model: nn.Module, folder: Path, out: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(out), "beta": 0.1, "per_device_train_batch_size": 2 * GROUP, "num_generations": GROUP,
        "max_completion_length": 6, "max_steps": 1, "learning_rate": 0.05, "optim": "sgd", "report_to": "none",
        "bf16": False, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 3,
    }  # fmt: skip
    return PCRTrainer(
        model=model,
        reward_funcs=reward,
        args=PCRConfig(**settings | options),
        train_dataset=Dataset.from_dict({"prompt": ["ab", "cde", "f g", "hij"]}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
    )


# -- its own again -------------------------------------------------------------------------------------------------


def stops_at(event: str) -> Any:
    def stop(*_: Any, **__: Any) -> None:
        raise TimeoutError

    return type("Stops", (TrainerCallback,), {event: stop})


def own_forwards(model: nn.Module) -> list[str]:
    """Layers whose forward is an attribute of theirs. The model itself is accelerate's affair."""
    return [name for name, module in model.named_modules() if name and "forward" in vars(module)]


def compiled(model: nn.Module) -> Tensor:
    model.eval()
    torch._dynamo.reset()
    ids = torch.ones(1, 4, dtype=torch.long)
    whole = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        logits: Tensor = whole(input_ids=ids, use_cache=False).logits
        assert torch.allclose(logits, model(input_ids=ids, use_cache=False).logits, atol=1e-5)
    return logits


@pytest.mark.parametrize("event", [None, "on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end"])
def test_the_model_compiles_whole_after_training_however_it_ended(
    event: str | None, folder: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    before = own_forwards(model)
    trainer = trainer_of(model, folder, tmp_path, gradient_accumulation_steps=2)
    compiled(model)
    if event is None:
        trainer.train()
    else:
        callback = stops_at(event)
        trainer.add_callback(callback)
        with pytest.raises(TimeoutError):
            trainer.train()
    assert own_forwards(model) == before
    compiled(model)
    assert "backward" not in vars(trainer.accelerator)
    if event is not None:  # a training that was interrupted can be taken up again
        trainer.callback_handler.pop_callback(callback)
        trainer.train()
        assert trainer.last_report is not None


def test_an_error_within_the_backward_passes_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    trainer = trainer_of(model, folder, tmp_path)

    def broken(gradient: Tensor) -> None:
        raise RuntimeError("out of memory, say")

    handle = model.lm_head.weight.register_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        trainer.train()
    compiled(model)
    handle.remove()
    trainer.train()
    assert trainer.last_report.finite


def test_two_trainers_of_one_model_work_in_turn(folder: Path, tmp_path: Path) -> None:
    """Made before either trains, the second goes on where the first has ended, as if made then."""
    weights = []
    for early in (True, False):
        model = LlamaForCausalLM.from_pretrained(folder)
        first = trainer_of(model, folder, tmp_path, rule="paper", loss_type="grpo")
        second = trainer_of(model, folder, tmp_path, rule="paper", loss_type="grpo") if early else None
        first.train()
        after_first = first.last_report
        second = second or trainer_of(model, folder, tmp_path, rule="paper", loss_type="grpo")
        torch.manual_seed(5)  # making a trainer sets the seed
        second.train()
        assert first.last_report is after_first
        assert second.last_report is not None
        compiled(model)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


# -- reentrant checkpointing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", ["auto", "loop"])
@pytest.mark.parametrize("name", ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"])
def test_reentrant_checkpointing_is_the_other_kind(
    name: str, norms: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the same gradients, in which the graph shows whose the rows are."""
    options = ONE_STEP | {name: {"use_reentrant": True}}
    _, expected = train(GRPOTrainer, GRPOConfig, folder, tmp_path, **options)
    with caplog.at_level(logging.WARNING, "pcr_torch"):
        _, got = train(PCRTrainer, PCRConfig, folder, tmp_path, rule="grpo", norms=norms, **options)
    assert relative_error(got.steps[0], expected.steps[0]) <= 1e-6
    assert "use_reentrant=True hides which response" in caplog.text
    _, plain = train(PCRTrainer, PCRConfig, folder, tmp_path, rule="grpo", norms=norms, **ONE_STEP)
    assert relative_error(got.steps[0], plain.steps[0]) <= 1e-6


class OwnCheckpoint(nn.Module):
    def __init__(self, mlp: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.mlp, self.reentrant = mlp, reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.mlp, x, use_reentrant=self.reentrant)


def with_own_checkpoints(folder: Path, *, reentrant: bool) -> nn.Module:
    model = LlamaForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        layer.mlp = OwnCheckpoint(layer.mlp, reentrant)
    made: nn.Module = model
    return made


def test_a_models_own_reentrant_checkpoints_are_refused_unless_rows_are_vouched_for(
    folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"gradient_checkpointing": False, "rule": "paper"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"a reentrant checkpoint .* hides which response a row"):
            trainer_of(with_own_checkpoints(folder, reentrant=True), folder, tmp_path, **options).train()
        reports = []
        for reentrant, norms in ((True, "fast"), (False, "fast"), (False, "auto")):
            model = with_own_checkpoints(folder, reentrant=reentrant)
            trainer = trainer_of(model, folder, tmp_path, norms=norms, **options)
            trainer.train()
            reports.append(trainer.last_report.statistics.plasticity_var)
    assert all(torch.allclose(each, reports[-1], rtol=1e-5) for each in reports)
