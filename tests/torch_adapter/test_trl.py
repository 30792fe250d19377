"""PCRTrainer against stock GRPOTrainer, and what it adds and refuses."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as stock
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import pcr_core
from pcr_torch import PCR
from pcr_torch.distributed import local
from pcr_torch.trl import PCRConfig, PCRTrainer
from pcr_torch.trl.groups import shuffle_groups
from pcr_torch.trl.separability import refuse_config, refuse_trainer

pytestmark = pytest.mark.filterwarnings("ignore")
GROUP = 4


def save_model(path: Path) -> Path:
    """A random character-level Llama on disk, where TRL finds its reference model."""
    vocabulary = {c: i for i, c in enumerate("_$abcdefghijklmnopqrstuvwxyz ")}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="_", eos_token="$", unk_token="_", padding_side="left"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def reward(completions: list[str], **_: Any) -> list[float]:
    return [len(set(c)) / 5 + c.count("a") for c in completions]


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})


def train(
    cls: Any, config: Any, folder: Path, out: Path, resume: str | bool | None = None, **options: Any
) -> tuple[Any, Gradients]:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "beta": 0.1,
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 3,
    }
    prompts = Dataset.from_dict({"prompt": ["ab", "cde", "f g", "hij", "kl", "mno", "pq", "rs"]})
    peft_config = options.pop("peft_config", None)
    reference_noise = options.pop("reference_noise", 0.0)
    trainer = cls(
        model=LlamaForCausalLM.from_pretrained(folder),
        reward_funcs=reward,
        args=config(**(settings | options)),
        train_dataset=prompts,
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        peft_config=peft_config,
    )
    if reference_noise:  # a reference that is not the policy: a KL gradient from the first step on
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in map(local, trainer.ref_model.parameters()):
                parameter.mul_(1 + reference_noise * torch.randn(parameter.shape, generator=generator))
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, gradients


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    error = sum(float((got[n] - expected[n]).double().square().sum()) for n in expected)
    return math.sqrt(error / sum(float(g.double().square().sum()) for g in expected.values()))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_sum_rule_reproduces_stock_grpo(
    loss_type: str, accumulation: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_groups(batch: dict[str, Any]) -> dict[str, Any]:
        return shuffle_groups(batch, torch.arange(batch["completion_ids"].shape[0]) // GROUP)

    monkeypatch.setattr(stock, "shuffle_sequence_dict", by_groups)  # same micro-batches, for bnpo's local normaliser
    options = {
        "loss_type": loss_type,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "reference_noise": 0.3,
    }
    theirs, expected = train(GRPOTrainer, GRPOConfig, folder, tmp_path, **options)
    ours, got = train(PCRTrainer, PCRConfig, folder, tmp_path, rule="grpo", **options)
    assert relative_error(got.steps[0], expected.steps[0]) <= 1e-6
    assert ours.last_report.metrics()["pcr/stability_norm"] > 0.01 * ours.last_report.metrics()["pcr/plasticity_norm"]
    same = ("loss", "kl", "reward", "entropy", "clip_ratio/region_mean", "completions/mean_length")
    for key in same:
        assert ours.state.log_history[0][key] == pytest.approx(theirs.state.log_history[0][key], rel=1e-5)


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "luspo", "vespo"])
def test_other_losses_of_trl_separate_too(
    loss_type: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)
    options = {"loss_type": loss_type, "max_steps": 1, "reference_noise": 0.3}
    if loss_type == "cispo":
        options["epsilon_high"] = 5.0
    if loss_type == "luspo":
        options["importance_sampling_level"] = "sequence"
    _, expected = train(GRPOTrainer, GRPOConfig, folder, tmp_path, **options)
    _, got = train(PCRTrainer, PCRConfig, folder, tmp_path, rule="grpo", **options)
    assert relative_error(got.steps[0], expected.steps[0]) <= 1e-6


def test_several_iterations_and_the_loop_agree_with_stock(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off-policy steps (num_iterations 2): ratios differ from 1 and old log-probabilities are carried along."""
    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)
    options = {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2}
    _, expected = train(GRPOTrainer, GRPOConfig, folder, tmp_path, **options)
    for norms in ("fast", "loop"):
        _, got = train(PCRTrainer, PCRConfig, folder, tmp_path, rule="grpo", norms=norms, **options)
        assert relative_error(got.steps[0], expected.steps[0]) <= 1e-6
        assert relative_error(got.steps[1], expected.steps[1]) <= 1e-5  # Adam magnifies the first step's rounding


def test_importance_sampling_ratios_reach_the_loss(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an engine for generation gives them; vespo reads them without one."""
    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)
    options = {"loss_type": "vespo", "max_steps": 1, "reference_noise": 0.3}
    _, plain = train(GRPOTrainer, GRPOConfig, folder, tmp_path, **options)
    generate = GRPOTrainer._generate_and_score_completions

    def with_ratios(self: Any, inputs: Any) -> Any:
        output = generate(self, inputs)
        shape = output["completion_ids"].shape
        output["importance_sampling_ratio"] = torch.linspace(0.5, 1.5, shape[0])[:, None].expand(shape)
        return output

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", with_ratios)
    _, expected = train(GRPOTrainer, GRPOConfig, folder, tmp_path, **options)
    _, got = train(PCRTrainer, PCRConfig, folder, tmp_path, rule="grpo", **options)
    assert relative_error(plain.steps[0], expected.steps[0]) > 1e-2
    assert relative_error(got.steps[0], expected.steps[0]) <= 1e-6


def test_metrics_and_report(folder: Path, tmp_path: Path) -> None:
    trainer, _ = train(PCRTrainer, PCRConfig, folder, tmp_path, alpha="snr", log_layers=True)
    logged = trainer.state.log_history[1]
    for name in (
        "conflict_rate",
        "conflict_rate_debiased",
        "noise_share",
        "cosine",
        "cosine_debiased",
        "alpha",
        "removed",
        "boost",
        "plasticity_norm",
        "stability_norm",
        "plasticity_nsr",
        "stability_nsr",
    ):
        assert math.isfinite(logged[f"pcr/{name}"])
        assert math.isfinite(logged[f"pcr/layer_01/{name}"])
    assert logged["kl"] > 0
    assert logged["pcr/stability_norm"] > 0
    report = trainer.last_report
    assert len(report.blocks) == 6
    assert logged["pcr/alpha"] == pytest.approx(float(report.weights.alpha.mean()))


def test_first_step_from_the_reference_has_no_stability_gradient(folder: Path, tmp_path: Path) -> None:
    trainer, _ = train(PCRTrainer, PCRConfig, folder, tmp_path, max_steps=1)
    first = trainer.state.log_history[0]
    assert first["pcr/stability_norm"] == pytest.approx(0.0, abs=1e-6)
    assert first["pcr/nonfinite_blocks"] == 0


def test_lora_through_the_trainer(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    trainer, gradients = train(
        PCRTrainer, PCRConfig, folder, tmp_path, peft_config=LoraConfig(r=2, target_modules=["up_proj", "q_proj"])
    )
    assert {block.family for block in trainer.last_report.blocks} == {"up_proj.lora_A", "up_proj.lora_B"}
    assert any("q_proj" in name for name in gradients.steps[1])


def test_evaluation_leaves_the_streams_alone(folder: Path, tmp_path: Path) -> None:
    trainer, _ = train(PCRTrainer, PCRConfig, folder, tmp_path, max_steps=1, num_generations_eval=2)
    before = trainer.last_report
    metrics = trainer.evaluate(Dataset.from_dict({"prompt": ["ab", "cd"]}))
    assert math.isfinite(metrics["eval_loss"])
    assert trainer.last_report is before


def test_amortised_steps_through_the_trainer_and_resumed_between(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    options: dict[str, Any] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "every": 3,
        "granularity": "global",
        "peft_config": LoraConfig(r=2, target_modules=["up_proj", "down_proj"]),
        "learning_rate": 0.05,
    }
    trainer, whole = train(PCRTrainer, PCRConfig, folder, tmp_path / "whole", **options)
    logged = [entry["pcr/measured"] for entry in trainer.state.log_history if "pcr/measured" in entry]
    assert logged == [1.0, 1.0, 0.0, 0.0]  # the first step starts from the reference, where S = 0
    _, rest = train(
        PCRTrainer, PCRConfig, folder, tmp_path / "rest", resume=str(tmp_path / "whole" / "checkpoint-2"), **options
    )
    assert all(torch.equal(rest.steps[k][name], whole.steps[2 + k][name]) for k in range(2) for name in whole.steps[2])


def test_shuffle_keeps_groups_together_and_rows_aligned() -> None:
    ids = torch.arange(12) // 3
    batch = {
        "x": torch.arange(12),
        "names": [str(i) for i in range(12)],
        "ids": ids,
        "none": None,
        "n": torch.tensor(4),
    }
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        out = shuffle_groups(batch, ids)
        assert out["names"] == [str(i) for i in out["x"].tolist()]
        assert torch.equal(out["ids"], out["x"] // 3)
        assert [len(set(part)) for part in out["ids"].reshape(4, 3).tolist()] == [1] * 4
        seen.add(tuple(out["ids"].tolist()))
    assert len(seen) > 5


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


class OffPolicy(PCRTrainer):
    """Responses that another policy has sampled."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        reference = output["ref_per_token_logps"]
        noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(2))
        return {**output, "old_per_token_logps": reference + 0.3 * noise}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("corrected", "kl"), [(None, "k3_ratio"), (True, "k3_ratio"), (False, "k3")])
def test_both_routes_have_the_same_streams(
    corrected: bool | None, kl: Any, level: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's KL is k3 times the ratio unless it is asked not to be, and `grpo_objective` has either."""
    given = []
    accumulate = PCR.accumulate_cotangents

    def recorded(self: PCR, logp: Tensor, plasticity: Tensor, stability: Tensor, **options: Any) -> None:
        given.append((logp.detach().clone(), plasticity.clone(), stability.clone()))
        accumulate(self, logp, plasticity, stability, **options)

    monkeypatch.setattr(PCR, "accumulate_cotangents", recorded)
    options: dict[str, Any] = {"loss_type": "grpo", "importance_sampling_level": level, "reference_noise": 0.3}
    if corrected is not None:
        options["use_bias_correction_kl"] = corrected
    trainer, _ = train(OffPolicy, PCRConfig, folder, tmp_path, max_steps=1, **options)
    ((logp, plasticity, stability),), batch = given, trainer._buffered_inputs[0]
    objective = pcr_core.grpo_objective(
        logp,
        batch["old_per_token_logps"],
        batch["ref_per_token_logps"],
        batch["advantages"],
        batch["completion_mask"],
        beta=0.1,
        importance=level,
        kl=kl,
    )
    for got, expected in ((objective.plasticity_cotangent, plasticity), (objective.stability_cotangent, stability)):
        assert (got - expected).norm() <= 1e-5 * expected.norm()
    logged = trainer.state.log_history[0]
    assert float(objective.kl) == pytest.approx(logged["kl"], rel=1e-5)
