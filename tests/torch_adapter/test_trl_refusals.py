"""What `PCRTrainer` refuses: settings, losses and devices under which the two gradients cannot be told apart."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig
from trl_runs import reward, train

import pcr_core
from pcr_torch.trl import PCRConfig, PCRTrainer
from pcr_torch.trl.separability import refuse_config, refuse_trainer

pytestmark = pytest.mark.filterwarnings("ignore")


def config(**options: Any) -> PCRConfig:
    return PCRConfig(output_dir="unused", report_to="none", bf16=False, use_cpu=True, **({"beta": 0.1} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta: PCR arbitrates between reward and KL"),
        ({"rule": "magic"}, "rule: expected one of"),
        ({"alpha": "2"}, r"alpha: expected 'variance', 'snr' or a number in \[0, 1\], got 2.0"),
        ({"rule": "grpo", "max_boost": 3.0}, "rule 'grpo' has no option 'max_boost'"),
        ({"rule": "hard", "prior": "shrinkage"}, "rule 'hard' has no prior"),
        ({"conflict": "debiased", "prior": "temporal"}, "no meaning with TemporalPrior"),
        ({"granularity": "row"}, "granularity: expected one of"),
        ({"gate": "soft"}, "gate: expected one of"),
        ({"rule": "paper", "max_boost": 10.0}, "rule 'paper' has no option 'max_boost'"),
        ({"rule": "grpo", "gate": "sign"}, "rule 'grpo' has no option 'gate'"),
        ({"rule": "fixed", "alpha": "variance"}, "alpha: expected a number"),
        ({"discount": 0.5}, "discount: only prior='temporal' has one"),
        ({"every": 0}, "every: expected an integer >= 1"),
        ({"every": "two"}, "every: expected an integer, got 'two'"),
        ({"beta": math.inf}, "beta: PCR arbitrates between reward and KL"),
    ],
)
def test_bad_configurations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy_coef": 0.1}, "entropy_coef: the entropy bonus belongs to neither stream"),
        ({"model_init_kwargs": {"use_kernels": True}}, "fused kernels may overwrite"),
        ({"optim": "galore_adamw_layerwise"}, "steps within the backward pass"),
        ({"optim": "lomo"}, "steps within the backward pass"),
        ({"enable_jit_checkpoint": True}, "it saves within a step"),
        (
            {"per_device_train_batch_size": 1, "strata": "batch", "num_generations": 2, "steps_per_generation": 2},
            "among the responses of a micro-batch, which needs two",
        ),
        ({"per_device_train_batch_size": 2, "num_generations": 3, "generation_batch_size": 6}, "single responses"),
    ],
)
def test_settings_that_cannot_be_separated_are_refused(
    options: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(PCRTrainer, PCRConfig, folder, tmp_path, **options)


def more_of_logp(self: Any, model: Any, inputs: Any) -> Any:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    keep = inputs["completion_ids"].shape[1]
    return 0.1 * self._get_per_token_logps_and_entropies(model, ids, mask, keep)[0].mean()


def a_forward_pass_of_its_own(self: Any, model: Any, inputs: Any) -> Any:
    ids = inputs["prompt_ids"]
    return 0.1 * model(input_ids=ids, attention_mask=inputs["prompt_mask"], labels=ids).loss


@pytest.mark.parametrize(
    ("method", "term", "message"),
    [
        ("_compute_loss", more_of_logp, "it is more than the sum of its reward and its KL term"),
        ("_compute_loss", a_forward_pass_of_its_own, "a term of it has a forward pass of its own"),
        ("compute_loss", a_forward_pass_of_its_own, "a term of it has a forward pass of its own"),
    ],
)
def test_a_loss_with_a_term_of_its_own_is_refused(
    method: str, term: Any, message: str, folder: Path, tmp_path: Path
) -> None:
    class Own(PCRTrainer):
        pass

    def with_term(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        return getattr(PCRTrainer, method)(self, model, inputs, *args, **options) + term(self, model, inputs)

    setattr(Own, method, with_term)
    with pytest.raises(ValueError, match=message):
        train(Own, PCRConfig, folder, tmp_path)


def test_fp16_deepspeed_and_liger_are_refused(folder: Path, tmp_path: Path) -> None:
    for name, value, message in (
        ("fp16", True, "loss scaler"),
        ("deepspeed", {"x": 1}, "engine owns the backward"),
        ("use_liger_kernel", True, "Liger's SwiGLU and GEGLU overwrite what they saved"),
    ):
        bad = config(gradient_checkpointing=False)
        setattr(bad, name, value)  # transformers itself needs a GPU, DeepSpeed or Liger to accept these
        with pytest.raises(ValueError, match=message):
            PCRTrainer(
                model=str(folder), reward_funcs=reward, args=bad, train_dataset=Dataset.from_dict({"prompt": ["a"]})
            )


@pytest.mark.parametrize("way", [{"gradient_checkpointing": True}, {"liger_kernel_config": {"geglu": False}}])
def test_liger_is_taken_where_nothing_that_it_overwrites_is_needed_again(way: dict[str, Any]) -> None:
    taken = config(**{"gradient_checkpointing": False} | way)
    taken.use_liger_kernel = True
    refuse_config(taken)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"state": SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))}, "set fsdp_version: 2"),
        (
            {"parallelism_config": SimpleNamespace(tp_enabled=False, cp_enabled=True, sp_enabled=False)},
            "context and sequence parallel split a response",
        ),
    ],
)
def test_ways_to_split_a_model_that_hide_gradients_are_refused(state: dict[str, Any], message: str) -> None:
    accelerator = SimpleNamespace(**({"state": None, "parallelism_config": None} | state))
    with pytest.raises(ValueError, match=message):
        refuse_trainer(SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(n_gpu=1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distributed_type": SimpleNamespace(value="MEGATRON_LM")}, "engine owns the backward pass"),
        ({"scaler": object()}, "loss scaler"),
        ({"model": SimpleNamespace(use_kernels=True)}, "fused kernels may overwrite"),
    ],
)
def test_what_shows_once_the_model_is_there_is_refused(change: dict[str, Any], message: str) -> None:
    fields = {"distributed_type": SimpleNamespace(value="NO"), "scaler": None, "model": None}
    found = fields | change
    accelerator = SimpleNamespace(
        state=None, distributed_type=found.pop("distributed_type"), scaler=found.pop("scaler")
    )
    with pytest.raises(ValueError, match=message):
        refuse_trainer(SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(n_gpu=1), **found))


def test_stock_config_is_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"expected a pcr_torch\.trl\.PCRConfig"):
        PCRTrainer(
            model=str(folder), reward_funcs=reward, args=GRPOConfig(output_dir="unused", use_cpu=True, bf16=False)
        )


def test_every_rule_has_a_configuration() -> None:
    for name in pcr_core.RULES:
        assert isinstance(config(rule=name).make_rule(), pcr_core.Rule)
    assert config(rule="fixed", alpha="0.25").make_rule() == pcr_core.FixedAlpha(0.25)
    assert config(rule="paper", update="literal").make_rule() == pcr_core.PCR.paper(update="literal")


def test_a_beta_set_to_zero_after_the_config_was_made_is_refused(folder: Path, tmp_path: Path) -> None:
    class Late(PCRConfig):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.beta = 0.0

    with pytest.raises(ValueError, match="beta: PCR arbitrates between reward and KL"):
        train(PCRTrainer, Late, folder, tmp_path)
