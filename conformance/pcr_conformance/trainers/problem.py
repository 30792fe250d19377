"""What a training stack is given and what it hands back: plain NumPy arrays and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pcr_core import BlockStatistics, Rule

Floats = NDArray[np.float64]
Rows = tuple[int, ...]
Normalization = Literal["grpo", "dapo", "dr_grpo"]
BLOCKS = ("up", "down")


@dataclass(frozen=True)
class TrainerBatch:
    """n scored responses of one step, in any order.

    Attributes:
        tokens: (n, prompt + T) ids; a prompt and its response, on the right whatever fills up the shorter ones.
        prompt: length of the prompts, which are all of one length.
        mask: (n, T) boolean, which entries are response tokens. What is masked may hold anything.
        group_ids: (n,) integers, the prompt of each response.
        rewards: (n,)
        advantages: (n,) rewards less their group's mean: `pcr_core.group_advantages(..., scale="none")`.
        logp_old: (n, T) log-probabilities of the response tokens under the policy that sampled them.
        logp_ref: (n, T) under the reference policy.
        split: rows of each microbatch of each process, `split[process][microbatch]`; every row once. A part of a group
            has two or more rows.
    """

    tokens: NDArray[np.int64]
    prompt: int
    mask: NDArray[np.bool_]
    group_ids: NDArray[np.int64]
    rewards: Floats
    advantages: Floats
    logp_old: Floats
    logp_ref: Floats
    split: tuple[tuple[Rows, ...], ...]

    @property
    def size(self) -> int:
        """n, of the whole batch."""
        return len(self.group_ids)

    def rows(self, rows: Sequence[int]) -> TrainerBatch:
        """Some of the responses, as one microbatch of one process.

        Example:
            >>> from pcr_conformance.trainers import make_problem
            >>> batch = make_problem(0).batches[0]
            >>> batch.rows([3, 0]).group_ids.tolist() == batch.group_ids[[3, 0]].tolist()
            True
        """
        at = np.asarray(rows, dtype=np.int64)
        per_row = ("tokens", "mask", "group_ids", "rewards", "advantages", "logp_old", "logp_ref")
        return replace(self, **{name: getattr(self, name)[at] for name in per_row}, split=((tuple(range(len(at))),),))


@dataclass(frozen=True)
class TrainerProblem:
    """A tiny language model, its batches, and how it is to be trained; one step a batch.

    The model, `pcr_conformance.trainers.model.logp` in NumPy, of tokens (n, length):

        e = embed[tokens]                      (n, length, features)
        x = e + mean of e up to here           cumsum(e, axis=1) / (1, 2, 3, ...)
        y = x + tanh(x @ up) @ down
        logits = y @ head                      position t scores token t + 1

    The loss is `pcr_core.grpo_objective` of the whole batch with these options, the optimizer plain SGD: each weight
    loses learning_rate times its update. `blocks` are resolved by the rule, one block a matrix; all others take P + S.

    Attributes:
        weights: embed (words, features), up (features, hidden), down (hidden, features), head (features, words).
        batches: of one shape.
        rule: any `pcr_core.Rule`.
        beta: KL coefficient.
        clip: (low, high), of the ratio of each token.
        normalization: "grpo": responses of the whole batch times the response's own length; "dapo": tokens of the whole
            batch; "dr_grpo": responses of the whole batch times `longest`.
        longest: the longest response that is allowed, whatever the batch is padded to.
        learning_rate: of plain SGD, without momentum, weight decay and clipping.
        blocks: names of weights.
    """

    weights: Mapping[str, Floats]
    batches: tuple[TrainerBatch, ...]
    rule: Rule
    beta: float
    clip: tuple[float, float]
    normalization: Normalization
    longest: int
    learning_rate: float
    blocks: tuple[str, ...] = BLOCKS

    @property
    def processes(self) -> int:
        return len(self.batches[0].split)

    @property
    def microbatches(self) -> int:
        return len(self.batches[0].split[0])

    def normalizer(self, batch: TrainerBatch) -> float:
        """`normalizer` of `pcr_core.grpo_objective` for a part of the batch: the whole batch's.

        Example:
            >>> from pcr_conformance.trainers import make_problem
            >>> problem = make_problem(0, normalization="dr_grpo")
            >>> problem.normalizer(problem.batches[0]) == problem.batches[0].size * problem.longest
            True
        """
        if self.normalization == "dapo":
            return float(batch.mask.sum())
        return float(batch.size * (self.longest if self.normalization == "dr_grpo" else 1))


@dataclass(frozen=True)
class TrainerResult:
    """After the last batch.

    Attributes:
        weights: of the names and shapes of the problem's, as float arrays.
        checkpoint: with the capability "resume": what `train` goes on from; it has to go through pickle, as through a
            file. A path counts as well.
        statistics: with the capability "statistics": of each step, what the rule decided on, in the order of `blocks`.
    """

    weights: Mapping[str, Any]
    checkpoint: Any = None
    statistics: Sequence[BlockStatistics[Any]] = ()
