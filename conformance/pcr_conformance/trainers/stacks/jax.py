"""`pcr_jax.make_train_step` with plain SGD, on one device or on several of the host."""

from __future__ import annotations

from dataclasses import fields
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from pcr_conformance.trainers.adapter import TrainerDefaults
from pcr_conformance.trainers.problem import Normalization, TrainerBatch, TrainerProblem, TrainerResult
from pcr_core import BlockStatistics
from pcr_jax import Rollouts, init_state, make_train_step

DEVICES = 2


def logp(params: Any, inputs: Any) -> Any:
    """(n, T) log-probabilities of the response tokens; `inputs` holds tokens and, to tell its length, a prompt."""
    tokens, prompt = inputs["tokens"], inputs["prompt"].shape[1]
    embedded = params["embed"][tokens]
    x = embedded + jnp.cumsum(embedded, axis=1) / jnp.arange(1, tokens.shape[1] + 1)[:, None]
    y = x + jnp.tanh(x @ params["up"]) @ params["down"]
    logs = jax.nn.log_softmax(y @ params["head"])[:, prompt - 1 : -1]
    return jnp.take_along_axis(logs, tokens[:, prompt:, None], axis=-1)[..., 0]


class JaxTrainer(TrainerDefaults):
    """Groups lie one after the other, filled up to one size; "processes" are devices that rollouts are split over.

    Args:
        norms: how the noise is measured, "fast" or "loop".
    """

    normalizations: tuple[Normalization, ...] = ("grpo", "dapo")  # its dr_grpo divides by the columns that it is given
    compiled = True
    software = f"jax {jax.__version__}"

    def __init__(self, norms: Any = "fast") -> None:
        self.norms, self.name = norms, "jax-loop" if norms == "loop" else "jax"

    @cached_property
    def capabilities(self) -> frozenset[str]:  # type: ignore[override]
        """Asked for late: it starts JAX, whose devices are settled from then on."""
        able = {"rules", "noise", "state", "unequal_groups", "microbatches", "resume", "statistics"}
        return frozenset(able | ({"processes"} if len(jax.devices()) >= DEVICES else set()))

    def train(self, problem: TrainerProblem, checkpoint: Any = None) -> TrainerResult:
        optimizer, place = optax.sgd(problem.learning_rate), _layout(problem.processes)
        blocks = rf"^({'|'.join(problem.blocks)})$"
        params = {name: jnp.asarray(weight, dtype=jnp.float32) for name, weight in problem.weights.items()}
        state = init_state(
            params if place is None else jax.device_put(params, place), optimizer, problem.rule, blocks=blocks
        )
        if checkpoint is not None:
            state = jax.tree.map(lambda kept, like: jax.device_put(kept, like.sharding), checkpoint, state)
        size = int(np.bincount(_numbered(problem.batches[0])).max())
        groups = len(set(problem.batches[0].group_ids[list(problem.batches[0].split[0][0])]))
        rule: Any = problem.rule
        step = _step(
            rule,
            problem.normalization,
            problem.beta,
            problem.clip,
            problem.learning_rate,
            blocks,
            size,
            groups * size,
            problem.processes,
            self.norms,
        )
        reports = []
        for batch in problem.batches:
            state, report = step(state, _rollouts(batch, size), None if place is None else state)
            reports.append(_in_order(report.resolution, problem))
        kept = jax.device_get(state)
        return TrainerResult(kept.params, kept, reports)


@cache
def _step(
    rule: Any, normalization: Any, beta: float, clip: Any, rate: float, blocks: str, size: int, microbatch: int,
    devices: int, norms: Any,
) -> Any:  # fmt: skip
    """A step that is compiled once for all problems of one kind; the layout is that of the first state it is given."""
    made: list[Any] = []

    def step(state: Any, rollouts: Rollouts, like: Any) -> Any:
        if not made:
            made.append(
                make_train_step(
                    logp,
                    optax.sgd(rate),
                    group_size=size,
                    beta=beta,
                    rule=rule,
                    blocks=blocks,
                    clip=clip,
                    normalization=normalization,
                    norms=norms,
                    microbatch=microbatch,
                    noise_every=1,
                    shardings=None if like is None else jax.tree.map(lambda x: x.sharding, like),
                )
            )
        return made[0](state, rollouts)

    return step


def _layout(devices: int) -> Any:
    if devices == 1:
        return None
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    return NamedSharding(mesh, PartitionSpec())


def _numbered(batch: TrainerBatch) -> Any:
    return np.unique(batch.group_ids, return_inverse=True)[1].reshape(-1)


def _rollouts(batch: TrainerBatch, size: int) -> Rollouts:
    """Groups in the order of the split, each filled up with absent rows to `size`."""
    rows, present = [], []
    numbers = _numbered(batch)
    for part in (part for process in batch.split for part in process):
        for group in dict.fromkeys(numbers[list(part)]):
            own = np.flatnonzero(numbers == group).tolist()
            rows += own + own[:1] * (size - len(own))
            present += [True] * len(own) + [False] * (size - len(own))
    at = np.asarray(rows)
    tokens, prompts = (jnp.asarray(x[at], dtype=jnp.int32) for x in (batch.tokens, batch.tokens[:, : batch.prompt]))
    old, ref, advantages = (
        jnp.asarray(x[at], dtype=jnp.float32) for x in (batch.logp_old, batch.logp_ref, batch.advantages)
    )
    inputs = {"tokens": tokens, "prompt": prompts}
    filled = None if all(present) else jnp.asarray(present)
    return Rollouts(inputs, old, ref, advantages, jnp.asarray(batch.mask[at]), filled)


def _in_order(resolution: Any, problem: TrainerProblem) -> BlockStatistics[Any]:
    at = [resolution.blocks.names.index(b) for b in problem.blocks]
    values = (getattr(resolution.statistics, f.name) for f in fields(BlockStatistics))
    return BlockStatistics(*(None if v is None else np.asarray(v)[at] for v in values))
