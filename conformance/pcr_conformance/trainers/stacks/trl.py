"""`pcr_torch.trl.PCRTrainer`, which is handed the problem's responses in the place of those it would generate."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
import trl
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOTrainer

import pcr_core
from pcr_conformance.trainers.adapter import TrainerDefaults, Unsupported
from pcr_conformance.trainers.problem import Normalization, TrainerBatch, TrainerProblem, TrainerResult
from pcr_conformance.trainers.stacks.gloo import on_ranks
from pcr_conformance.trainers.stacks.hub_model import as_numpy, saved
from pcr_conformance.trainers.stacks.torch import in_order
from pcr_core import Rule
from pcr_torch.trl import PCRConfig, PCRTrainer


class TrlTrainer(TrainerDefaults):
    """The whole trainer: its loss, accumulation, optimizer, checkpoints and, on two processes, DistributedDataParallel.

    It shuffles groups before it splits a batch, so which group is in which microbatch is its own affair.
    """

    name = "trl"
    capabilities = frozenset({"rules", "noise", "state", "microbatches", "processes", "resume", "statistics"})
    normalizations: tuple[Normalization, ...] = ("grpo", "dapo", "dr_grpo")
    software = f"trl {trl.__version__}, torch {torch.__version__}"

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="pcr-trl-")

    def train(self, problem: TrainerProblem, checkpoint: Any = None) -> TrainerResult:
        options = options_of(problem.rule)
        folder = mkdtemp(dir=self._folder.name)
        saved(problem, Path(folder))
        if problem.processes == 1:
            return _train(0, problem, checkpoint, options, folder)
        first, *_ = on_ranks(_on_a_rank, problem.processes, problem, checkpoint, options, folder)
        return first  # type: ignore[no-any-return]


def options_of(rule: Rule) -> dict[str, Any]:
    """The fields of PCRConfig that make this rule; `Unsupported` where it has none of them.

    Example:
        >>> options_of(pcr_core.HardProjection()), options_of(pcr_core.PCR())["max_boost"]
        ({'rule': 'hard'}, 10.0)
    """
    names: dict[type, str] = {
        pcr_core.GRPO: "grpo",
        pcr_core.NoAnchor: "no_anchor",
        pcr_core.HardProjection: "hard",
        pcr_core.PCGrad: "pcgrad",
        pcr_core.MGDA: "mgda",
    }
    if type(rule) in names:
        return {"rule": names[type(rule)]}
    if not isinstance(rule, pcr_core.PCR):
        raise Unsupported(f"no option of PCRConfig makes {rule}")
    prior = type(rule.prior).__name__.removesuffix("Prior").lower()
    options = {"rule": "pcr", "alpha": str(rule.alpha), "max_boost": rule.max_boost, "prior": prior}
    if isinstance(rule.prior, pcr_core.TemporalPrior):
        options["discount"] = rule.prior.discount
    return options | {name: getattr(rule, name) for name in ("update", "gate", "conflict")}


class _Prepared(GRPOTrainer):  # type: ignore[misc]
    """Comes after PCRTrainer's own classes, which so find ready responses where GRPOTrainer would generate."""

    problem: TrainerProblem
    first: int  # the step that the problem begins with

    def _generate(self, prompts: Any) -> Any:
        part = self._rows()
        responses = [row[keep].tolist() for row, keep in zip(part.tokens[:, part.prompt :], part.mask, strict=True)]
        return part.tokens[:, : part.prompt].tolist(), responses

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        part, whole = self._rows(), self.problem.batches[self.state.global_step - self.first]
        self._generate(None)
        mask, tokens = torch.tensor(part.mask), torch.tensor(part.tokens)
        prompts = tokens[:, : part.prompt]
        made = {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": tokens[:, part.prompt :].masked_fill(~mask, self._tokenizer.pad_token_id),
            "completion_mask": mask.int(),
            "num_items_in_batch": torch.tensor(int(whole.mask.sum())),
        }
        floats = {
            "advantages": part.advantages,
            "old_per_token_logps": part.logp_old,
            "ref_per_token_logps": part.logp_ref,
        }
        return made | {name: torch.tensor(x, dtype=torch.float32) for name, x in floats.items()}

    def _rows(self) -> TrainerBatch:
        """This process's responses of this step; those of a group lie together, as TRL has them."""
        batch: TrainerBatch = self.problem.batches[self.state.global_step - self.first]
        parts = batch.split[self.accelerator.process_index]
        return batch.rows([row for part in parts for row in sorted(part, key=lambda i: batch.group_ids[i])])


class _Fed(PCRTrainer, _Prepared):
    """PCRTrainer on prepared responses."""


class _Reports(TrainerCallback):  # type: ignore[misc]
    def __init__(self, problem: TrainerProblem) -> None:
        self.problem, self.found = problem, []  # type: ignore[var-annotated]
        self.trainer: Any = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        report = self.trainer.last_report
        names = [block.name.split(".")[-2] for block in report.blocks]
        self.found.append(in_order(names, self.problem.blocks, report.statistics))


def _on_a_rank(
    rank: int, problem: TrainerProblem, checkpoint: Any, options: dict[str, Any], folder: str
) -> TrainerResult:
    for state in (AcceleratorState, PartialState, GradientState):  # of an earlier trainer in this process
        state._reset_state()
    return _train(rank, problem, checkpoint, options, folder)


def _train(rank: int, problem: TrainerProblem, checkpoint: Any, options: dict[str, Any], folder: str) -> TrainerResult:
    first, batch = 0 if checkpoint is None else checkpoint["step"], problem.batches[0]
    last = first + len(problem.batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PCRConfig(
            output_dir=f"{folder}/out",
            blocks=rf"({'|'.join(problem.blocks)})\.weight",
            noise_every=1,
            beta=problem.beta,
            epsilon=problem.clip[0],
            epsilon_high=problem.clip[1],
            loss_type=problem.normalization,
            use_bias_correction_kl=False,
            max_completion_length=problem.longest,
            num_generations=int((batch.group_ids == batch.group_ids[0]).sum()),
            per_device_train_batch_size=len(batch.split[0][0]),
            gradient_accumulation_steps=problem.microbatches,
            learning_rate=problem.learning_rate,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            max_steps=last,
            save_strategy="steps",
            save_steps=1,  # whatever is left of the run: a resumed one is told of other settings
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **options,
        )
        trainer = _Fed(
            model=f"{folder}/model",
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["0"] * 64}),
            processing_class=_tokenizer(len(problem.weights["embed"])),
        )
        trainer.problem, trainer.first = problem, first
        reports = _Reports(problem)
        reports.trainer = trainer
        trainer.add_callback(reports)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else checkpoint["folder"])
    kept = {"step": last, "folder": f"{folder}/out/checkpoint-{last}"}
    return TrainerResult(as_numpy(trainer.model), kept, reports.found)


def _tokenizer(words: int) -> Any:
    """A word is its number; one more pads."""
    vocabulary = {str(i): i for i in range(words)} | {"_": words}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="_", eos_token="_", unk_token="_", padding_side="left"
    )
