"""Training steps of pcr-train in JAX: sample, score, and one compiled update.

Nothing but the state of `make_train_step` goes from step to step: what step k draws follows from the seed and k. So a
checkpoint is that state, and a resumed run takes the steps that an uninterrupted one would have taken.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import pcr_core
from pcr_core._summary import summary
from pcr_jax.blocks import Blocks, select_blocks
from pcr_jax.resolve import Report
from pcr_jax.train.generate import Responses, generate, pad_left, token_logp
from pcr_jax.train_step import Rollouts, StepReport, TrainState, init_state, make_train_step
from pcr_train.engine import response_limit
from pcr_train.lessons import PAD, VOCABULARY
from pcr_train.progress import block_columns
from pcr_train.settings import Settings
from pcr_train.tasks import Problem, Task

MAX_GRAD_NORM = 1.0
"""Of the update, as in TRL."""


class Loop:
    """A run's steps on problems of `task`, none of them held out.

    Attributes:
        state: before the first step; a checkpoint holds a later one.

    Raises:
        ValueError: an option that the rule does not have, or blocks that match nothing.
    """

    def __init__(
        self, settings: Settings, task: Task, tokenizer: Any, structure: Any, start: Any, heldout: Sequence[Problem]
    ) -> None:
        self.settings, self.task, self.tokenizer = settings, task, tokenizer
        self.structure, self.start = structure, start
        self.rows = list(itertools.islice(task.training(heldout), settings.steps * settings.prompts))
        self.length = response_limit(settings, task, tokenizer)
        self.stop = stop_tokens(task)
        optimizer = optax.chain(
            optax.snapshot("grad_norm", optax.tree.norm),
            optax.clip_by_global_norm(MAX_GRAD_NORM),
            optax.adam(settings.learning_rate, b1=0.9, b2=0.99),
        )
        blocks = select_blocks(start, settings.blocks, settings.granularity)  # type: ignore[arg-type]
        rule = settings.make_rule()
        self.update = make_train_step(
            self.logp,
            optimizer,
            group_size=settings.generations,
            beta=settings.beta,
            kl=settings.kl or "k3",  # type: ignore[arg-type]
            rule=rule,
            blocks=blocks,
            normalization="dapo",
            microbatch=(settings.micro_prompts or settings.prompts) * settings.generations,
            noise_every=settings.noise_every,
            baseline=settings.baseline,
        )
        self.reference = jax.jit(self.logp)
        self.state = init_state(start, optimizer, rule, blocks=blocks, baseline=settings.baseline is not None)

    def logp(self, params: Any, inputs: Any) -> Array:
        return token_logp(
            self.structure,
            params,
            inputs["tokens"],
            inputs["start"],
            length=self.length,
            temperature=self.settings.temperature,
        )

    def step(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state after one more step, and its row of metrics.jsonl. The old state's memory is taken."""
        began = time.perf_counter()
        settings, number = self.settings, int(state.step)
        first = number * settings.prompts
        problems = [
            problem for problem in self.rows[first : first + settings.prompts] for _ in range(settings.generations)
        ]
        prompts, start = pad_left(self.tokenizer([p.prompt for p in problems])["input_ids"], VOCABULARY[PAD])
        responses = generate(
            self.structure,
            state.params,
            prompts,
            start,
            row_keys(jax.random.fold_in(jax.random.key(settings.seed), number), len(problems)),
            length=self.length,
            stop=self.stop,
            temperature=settings.temperature,
            pad=VOCABULARY[PAD],
        )
        texts = [self.tokenizer.decode(ids) for ids in np.asarray(responses.tokens).tolist()]
        rewards = np.asarray([self.task.score(p, text) for p, text in zip(problems, texts, strict=True)], np.float32)
        inputs = {"tokens": jnp.concatenate([prompts, responses.tokens], axis=1), "start": start}
        groups = np.arange(len(problems)) // settings.generations
        rollouts = Rollouts(
            inputs,
            responses.logp,
            self.reference(self.start, inputs),
            jnp.asarray(pcr_core.group_advantages(rewards, groups)),
            responses.mask,
        )
        state, report = self.update(state, rollouts)
        row = self._row(number + 1, rewards, responses, state, report)
        row["seconds"] = time.perf_counter() - began
        row["blocks"] = _block_columns(report.resolution)
        return state, row

    def _row(
        self, step: int, rewards: Any, responses: Responses, state: TrainState, report: StepReport
    ) -> dict[str, Any]:
        lengths, ended = np.asarray(responses.mask).sum(1), np.asarray(responses.ended)
        seen = on_host(report.resolution)
        return {
            "step": step,
            "loss": float(report.plasticity_loss) + float(report.stability_loss),
            "grad_norm": float(optax.tree.get(state.optimizer, "grad_norm")),
            "learning_rate": self.settings.learning_rate,
            "completions/mean_length": float(lengths.mean()),
            "completions/clipped_ratio": float(1 - ended.mean()),
            "reward": float(rewards.mean()),
            "kl": float(report.kl),
            **summary(seen.weights, seen.statistics, slice(None), "pcr/"),
            **_shift(report),
        }


def stop_tokens(task: Task) -> Array:
    """(vocabulary,) whether a token ends a response: the end, and those that contain the task's stop."""
    return jnp.asarray([token == "<eos>" or task.stop in token for token in VOCABULARY])


def row_keys(key: Array, n: int) -> Array:
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(n))


def on_host(report: Report) -> Report:
    """With NumPy arrays, floating ones in float64, for logs."""

    def move(x: Array) -> Any:
        return np.asarray(x, dtype=bool if x.dtype == bool else np.float64)

    moved: Report = jax.tree.map(move, report)
    return moved


def _shift(report: StepReport) -> dict[str, float]:
    """The baseline's metrics, named as `pcr_torch.Report.metrics` names them."""
    found = report.baseline
    named = {} if found is None else {"pcr/baseline": found.applied, "pcr/baseline_reduction": found.reduction}
    return {name: float(value) for name, value in named.items() if value is not None}


def _block_columns(report: Report) -> dict[str, list[Any]]:
    seen, blocks = on_host(report), report.blocks
    return block_columns(blocks.names, blocks.layers, blocks.stacks, _families(blocks), seen.weights, seen.statistics)


def _families(blocks: Blocks) -> list[str]:
    """Kind of module of each block, such as "up_proj"; "layer" or "global" for several."""
    found = []
    for block, name in enumerate(blocks.names):
        members = [path for k, path in enumerate(blocks.paths) if block in blocks.of_layers(k)]
        words = [word for word in name.split("/") if word not in ("kernel", "scale") and not word.isdigit()]
        found.append(words[-1] if len(members) == 1 else "global" if blocks.layers[block] is None else "layer")
    return found
