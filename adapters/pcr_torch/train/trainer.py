"""A PCRTrainer from settings: the reward, the order of the problems, and options under which a checkpoint is whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from pcr_torch.trl import PCRConfig, PCRTrainer
from pcr_train.engine import response_limit
from pcr_train.settings import RULE_OPTIONS, Settings
from pcr_train.tasks import Problem, Task


def make_trainer(
    settings: Settings,
    folder: Path,
    model: Any,
    tokenizer: Any,
    task: Task,
    heldout: Sequence[Problem],
    kind: Any = PCRTrainer,
    **options: Any,
) -> Any:
    """A trainer that will take `settings.steps` steps on problems of `task`, none of them held out.

    Args:
        settings: of the run.
        folder: for its checkpoints.
        model: to train.
        tokenizer: of the model.
        task: the problems and their score.
        heldout: problems that are left out.
        kind: `PCRTrainer`, or TRL's own to compare it with.
        options: of the trainer, besides.
    """
    if settings.router_loss and not hasattr(model.config.get_text_config(), "output_router_logits"):
        raise ValueError(
            f"--router-loss: {settings.model} is no mixture of experts that gives such a loss; leave it out"
        )
    # one row a problem in the order of training: resuming needs no shuffled sampler to be replayed
    rows = list(itertools.islice(task.training(heldout), settings.steps * settings.prompts))
    trainer = kind(
        model=model,
        reward_funcs=_reward(task, rows),
        args=_config(settings, folder, response_limit(settings, task, tokenizer)),
        train_dataset=Dataset.from_dict({"prompt": [p.prompt for p in rows], "row": list(range(len(rows)))}),
        processing_class=tokenizer,
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _config(settings: Settings, folder: Path, max_tokens: int) -> PCRConfig:
    parts = 1 if settings.micro_prompts is None else settings.prompts // settings.micro_prompts
    rule = {name: getattr(settings, name) for name in RULE_OPTIONS if getattr(settings, name) is not None}
    kl: dict[str, Any] = {} if settings.kl is None else {"use_bias_correction_kl": settings.kl == "k3_ratio"}
    return PCRConfig(
        output_dir=str(folder),
        rule=settings.rule,
        **rule,
        blocks=settings.blocks,
        granularity=settings.granularity,
        norms=settings.norms,
        noise_every=settings.noise_every,
        baseline=settings.baseline,
        router_aux_loss_coef=settings.router_loss,  # not the model's own, by default: it takes a backward pass more
        beta=settings.beta,
        **kl,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.99,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.prompts * settings.generations // parts,
        gradient_accumulation_steps=parts,
        steps_per_generation=parts,  # every optimizer step starts from new responses, so a checkpoint is a whole state
        num_iterations=1,
        num_generations=settings.generations,
        max_completion_length=max_tokens,
        temperature=settings.temperature,
        shuffle_dataset=False,
        seed=settings.seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,  # should the newest turn out to be damaged
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=settings.precision == "bfloat16",
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )


def _reward(task: Task, rows: list[Problem]) -> Callable[..., list[float]]:
    def reward(completions: list[str], row: list[int], **_: Any) -> list[float]:
        return [task.score(rows[i], text) for i, text in zip(row, completions, strict=True)]

    return reward
