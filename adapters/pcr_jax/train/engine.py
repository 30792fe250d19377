"""JAX's part of pcr-train: a small flax nnx transformer under `make_train_step`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pcr_jax.blocks import describe_blocks
from pcr_jax.train import checkpoint as files
from pcr_jax.train.generate import generate, pad_left, token_logp
from pcr_jax.train.loop import Loop, row_keys, stop_tokens
from pcr_jax.train.tiny import make_tiny, new_tiny
from pcr_train import checksums
from pcr_train.folder import refuse_damaged_start, step_of
from pcr_train.lessons import PAD, VOCABULARY, CharacterTokenizer
from pcr_train.settings import Settings
from pcr_train.tasks import Problem, Task

BATCH = 64
"""Responses measured at once; fewer are filled up, so that they share a compiled program."""


class JaxEngine:
    """The `pcr_train.engine.Engine` of JAX."""

    def __init__(self, settings: Settings, task: Task, folder: Path) -> None:
        self.settings, self.task, self.folder = settings, task, folder
        self.tokenizer = CharacterTokenizer()
        self.structure, new = new_tiny(settings.seed)
        start = folder / "start"
        if not files.is_complete(start):
            files.save(make_tiny(task, seed=settings.seed), start)
        refuse_damaged_start(start)
        self.params = files.load(start, new)
        self.reference = files.digest(self.params)
        self.stop = stop_tokens(task)
        self.loop: Loop | None = None

    @staticmethod
    def check(settings: Settings) -> None:
        if settings.model != "tiny":
            raise ValueError(
                f"--model: --framework jax trains the built-in model tiny only, got {settings.model!r}; add --model "
                "tiny, or use --framework torch. For a model of your own see pcr_jax.make_train_step"
            )
        if settings.precision != "float32":
            raise ValueError("--precision: --framework jax trains in float32; use --framework torch for bfloat16")
        if settings.router_loss:
            raise ValueError("--router-loss: --framework jax trains a model without experts; leave it out")
        if settings.norms != "auto":
            raise ValueError("--norms: --framework jax measures its one model in one way; leave it out")
        if settings.granularity == "module":
            raise ValueError(
                "--granularity module: not with --framework jax, where a block is a tensor, a layer or global"
            )

    @staticmethod
    def blocks_table(settings: Settings) -> str:
        return describe_blocks(new_tiny(settings.seed)[1])

    @staticmethod
    def configure(settings: Settings, threads: int | None) -> None:
        # read when JAX starts its CPU client; tiny: the cost of sharing its work is more than the work
        os.environ["NPROC"] = str(threads or 1)

    @staticmethod
    def damaged(checkpoint: Path) -> Path | None:
        return checksums.damaged(checkpoint)

    @staticmethod
    def is_complete(checkpoint: Path) -> bool:
        return files.is_complete(checkpoint)

    def respond(self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> list[str]:
        rows = self.tokenizer(prompts)["input_ids"]
        keys = row_keys(jax.random.key(seed), -(-len(rows) // BATCH) * BATCH)
        out: list[str] = []
        for first in range(0, len(rows), BATCH):
            part = rows[first : first + BATCH]
            tokens, start = pad_left(part + part[:1] * (BATCH - len(part)), VOCABULARY[PAD])
            responses = generate(
                self.structure,
                self.params,
                tokens,
                start,
                keys[first : first + BATCH],
                length=max_tokens,
                stop=self.stop,
                temperature=temperature or 1.0,
                greedy=not temperature,
                pad=VOCABULARY[PAD],
            )
            out += [self.tokenizer.decode(ids) for ids in np.asarray(responses.tokens)[: len(part)].tolist()]
        return out

    def text_nll(self, text: str) -> float:
        (ids,) = self.tokenizer([text])["input_ids"]
        tokens, start = pad_left([ids], VOCABULARY[PAD], multiple=1)
        logp = jax.jit(token_logp, static_argnames=("structure", "length"))(
            self.structure, self.params, tokens, start, length=len(ids) - 1
        )
        return -float(np.asarray(logp, np.float64).mean())

    def prepare(self, heldout: Sequence[Problem]) -> None:
        self.loop = Loop(self.settings, self.task, self.tokenizer, self.structure, self.params, heldout)

    def train(
        self, checkpoint: Path | None, on_step: Callable[[dict[str, Any]], None], stopping: Callable[[], bool]
    ) -> int:
        assert self.loop is not None
        state = self.loop.state
        if checkpoint is not None:
            files.refuse_other_reference(checkpoint, self.reference)
            state = files.load(checkpoint, state)
        step = int(state.step)
        while step < self.settings.steps:
            state, row = self.loop.step(state)
            step = row["step"]
            on_step(row)
            ending = step == self.settings.steps or stopping()
            if ending or step % self.settings.save_every == 0:
                self._save(state, step)
            if ending:
                break
        self.params = state.params
        return step

    def _save(self, state: Any, step: int) -> None:
        newest = self.folder / f"checkpoint-{step}"
        files.save(state, newest, reference=self.reference)
        saved = sorted(self.folder.glob("checkpoint-*"), key=step_of)
        for older in saved[:-2]:  # one is left, should the newest turn out to be damaged
            shutil.rmtree(older)
