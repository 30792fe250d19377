"""The router loss of a mixture of experts: a further loss, whose gradient all that is trained gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as stock
from peft import LoraConfig
from transformers import MixtralConfig, MixtralForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl_runs import relative_error, save_model, train

from pcr_torch.trl import PCRConfig, PCRTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
ATTENTION = r"self_attn\.o_proj"  # in plain linear layers, which probes can measure


@pytest.fixture(autouse=True)
def _mixtures_in_the_same_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_runs.LlamaForCausalLM", MixtralForCausalLM)
    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_model(tmp_path_factory.mktemp("mixture"))
    torch.manual_seed(0)
    MixtralForCausalLM(
        MixtralConfig(vocab_size=29, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=1, num_local_experts=3, eos_token_id=1, pad_token_id=0, bos_token_id=None,
                      router_aux_loss_coef=0.3)
    ).save_pretrained(path)  # fmt: skip
    return path


CASES: dict[str, dict[str, Any]] = {
    "without noise": {"noise_every": 0},
    "by the loop": {"noise_every": 1},
    "by probes": {"noise_every": 1, "norms": "fast", "blocks": ATTENTION},
    "a coefficient of one's own": {"router_aux_loss_coef": 0.7},
    "accumulating, checkpointing": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "twice the same responses": {"num_iterations": 2, "max_steps": 2},
    "amortised": {"every": 2, "blocks": "all", "granularity": "global", "max_steps": 2},
    "adapters": {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "o_proj"]), "blocks": "lora_"},
}
OURS = ("noise_every", "norms", "blocks", "every", "granularity")


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_stock_trainer(case: str, mixture: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    options |= {} if case == "adapters" else {"reference_noise": 0.3}
    options |= CASES[case]
    theirs = {name: value for name, value in options.items() if name not in OURS}
    stocks, expected = train(GRPOTrainer, GRPOConfig, mixture, tmp_path, **theirs)
    mine, got = train(PCRTrainer, PCRConfig, mixture, tmp_path, rule="grpo", **options)
    assert len(got.steps) == len(expected.steps) == options["max_steps"]
    for one, other in zip(got.steps, expected.steps, strict=True):
        assert relative_error(one, other) <= 1e-6
    for one, other in zip(mine.state.log_history[:-1], stocks.state.log_history[:-1], strict=True):
        assert one["aux_loss"] == pytest.approx(other["aux_loss"], rel=1e-5)
        assert other["aux_loss"] > 0
    _, without = train(PCRTrainer, PCRConfig, mixture, tmp_path, rule="grpo", **options | {"router_aux_loss_coef": 0.0})
    assert relative_error(without.steps[0], expected.steps[0]) > 1e-3


def test_whatever_the_rule_it_is_added(mixture: Path, tmp_path: Path) -> None:
    """Blocks are resolved as if there were no router loss, and its gradient comes on top."""
    options: dict[str, Any] = {"max_steps": 1, "reference_noise": 0.3, "max_grad_norm": 0.0}
    found = {}
    for rule in ("grpo", "hard"):
        for coef in (0.0, 0.3):
            trainer, gradients = train(
                PCRTrainer, PCRConfig, mixture, tmp_path, rule=rule, router_aux_loss_coef=coef, **options
            )
            found[rule, coef] = gradients.steps[0], trainer.last_report
    for name in found["hard", 0.3][0]:
        of_router = [found[rule, 0.3][0][name] - found[rule, 0.0][0][name] for rule in ("grpo", "hard")]
        torch.testing.assert_close(*of_router, rtol=1e-4, atol=1e-5)
    one, other = (found["hard", coef][1] for coef in (0.0, 0.3))
    assert one.weights.conflict.any()
    torch.testing.assert_close(one.statistics.dot, other.statistics.dot)
    assert torch.equal(one.weights.conflict, other.weights.conflict)


def test_a_subclass_may_ask_again_without_it(mixture: Path, tmp_path: Path) -> None:
    """Of the same text it gets the same forward pass, with or without its router loss."""

    class Asks:
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            asked = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])  # type: ignore[attr-defined]
            assert asked[2] is None
            return super()._compute_loss(model, inputs) + 0 * asked[0].sum() * inputs["advantages"].sum()  # type: ignore[misc]

    options: dict[str, Any] = {"max_steps": 1, "reference_noise": 0.3}
    _, expected = train(type("Stock", (Asks, GRPOTrainer), {}), GRPOConfig, mixture, tmp_path, **options)
    _, got = train(type("Mine", (Asks, PCRTrainer), {}), PCRConfig, mixture, tmp_path, rule="grpo", **options)
    assert relative_error(got.steps[0], expected.steps[0]) <= 1e-6
