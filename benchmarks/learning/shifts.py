"""Advantages other than GRPO's, for the simulated bandits: a shift from measured norms, and the leave-one-out mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import pcr_core as pcr
from benchmarks.learning.bandit import Decision, Memoryless, Params, Streams


@dataclass(frozen=True)
class Measured:
    """GRPO's advantages less b of docs/baseline.md, from the measured norms of earlier steps; `share` of it.

    With `proxy` the derivative with respect to the logits takes the gradient's place, which costs no backward pass.
    """

    rule: pcr.Rule
    memory: float = 0.9
    share: float = 1.0
    proxy: bool = False

    def start(self, params: Params) -> Any:
        return pcr.BaselineSums(*jnp.zeros(6))

    def advantages(self, rewards: Array, ids: Array, state: Any) -> Array:
        return pcr.group_advantages(rewards, ids) - self.shift(state)

    def shift(self, state: Any) -> Array:
        shift: Array = self.share * pcr.estimate_baseline(state).shift
        return shift

    def decide(self, streams: Streams, progress: Array, state: Any) -> Decision:
        assert streams.response_sq is not None
        assert streams.advantages is not None
        assert streams.ids is not None
        assert streams.logit_sq is not None
        square = streams.advantages**2 * streams.logit_sq if self.proxy else streams.response_sq
        sums = pcr.baseline_sums(square, streams.advantages, group_ids=streams.ids, shift=self.shift(state))
        state = pcr.update_baseline_sums(state, sums, memory=self.memory)
        return Decision(self.rule(streams.statistics), jax.tree.map(jnp.zeros_like, streams.plasticity), state)


@dataclass(frozen=True)
class Constant(Memoryless):
    """Control: the same shift in every step, which knows nothing."""

    shift: float = 0.0

    def advantages(self, rewards: Array, ids: Array, state: Any) -> Array:
        given: Array = pcr.group_advantages(rewards, ids) - self.shift
        return given


@dataclass(frozen=True)
class LeaveOneOut(Memoryless):
    """RLOO: the reward less the mean of the other rewards of its group, in no unit."""

    def advantages(self, rewards: Array, ids: Array, state: Any) -> Array:
        size = jnp.sum(ids[:, None] == ids[None, :], axis=1)
        given: Array = pcr.group_advantages(rewards, ids, scale="none") * size / (size - 1)
        return given
