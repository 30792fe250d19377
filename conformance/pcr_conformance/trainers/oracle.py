"""The loop: per-response gradients one by one in float64, the rule on their sums, plain SGD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import pcr_core
from pcr_conformance.trainers.model import NAMES, contributions, logp
from pcr_conformance.trainers.problem import Floats, TrainerBatch, TrainerProblem
from pcr_core import BlockStatistics, PriorState

Objective = pcr_core.Objective[Any]


@dataclass
class Loop:
    """Weights on their way through a problem.

    Attributes:
        weights: after the steps so far.
        prior: what a temporal prior carries.
        sizes: by name, the sum over steps of learning_rate (|a| sum_i |p_i| + |b| sum_i |s_i|); rounding errors are
            fractions of it.
        statistics: of each step.
        streams: of each step, (2, blocks): sum_i |p_i| and sum_i |s_i|, for rounding errors in the statistics.
    """

    weights: dict[str, Floats]
    prior: PriorState[Any] | None = None
    sizes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    statistics: list[BlockStatistics[Any]] = field(default_factory=list)
    streams: list[Floats] = field(default_factory=list)

    def step(self, problem: TrainerProblem, batch: TrainerBatch) -> None:
        """One batch; groups that are split over microbatches or processes are strata of their own."""
        loss = objective(problem, batch, self.weights)
        p = contributions(self.weights, batch, loss.plasticity_cotangent)
        s = contributions(self.weights, batch, loss.stability_cotangent)
        n, blocks = batch.size, problem.blocks
        flat_p, flat_s = (np.concatenate([c[b].reshape(n, -1) for b in blocks], axis=1) for c in (p, s))
        resolved = pcr_core.resolve(
            flat_p,
            flat_s,
            group_ids=strata(batch),
            rule=problem.rule,
            sizes=[self.weights[b].size for b in blocks],
            state=self.prior,
        )
        self.prior = resolved.state
        self.statistics.append(resolved.statistics)
        self.streams.append(np.asarray([[_norms(c[b]) for b in blocks] for c in (p, s)]))
        ends = np.cumsum([self.weights[b].size for b in blocks])
        updates = dict(zip(blocks, np.split(resolved.update, ends[:-1]), strict=True))
        weights = resolved.weights
        pairs = {b: (abs(weights.plasticity[i]), abs(weights.stability[i])) for i, b in enumerate(blocks)}
        for name in NAMES:
            update = updates[name] if name in updates else p[name].sum(0) + s[name].sum(0)
            a, b = pairs.get(name, (1.0, 1.0))
            self.sizes[name] += problem.learning_rate * float(a * _norms(p[name]) + b * _norms(s[name]))
            self.weights[name] = self.weights[name] - problem.learning_rate * update.reshape(self.weights[name].shape)


def objective(problem: TrainerProblem, batch: TrainerBatch, weights: Mapping[str, Floats]) -> Objective:
    """Losses and cotangents of the whole batch."""
    return pcr_core.grpo_objective(
        logp(weights, batch),
        batch.logp_old,
        batch.logp_ref,
        batch.advantages,
        batch.mask,
        beta=problem.beta,
        clip=problem.clip,
        normalization=problem.normalization,
        normalizer=problem.normalizer(batch),
    )


def strata(batch: TrainerBatch) -> Any:
    """(n,) ids that tell apart groups, and the parts of a group in different microbatches or processes."""
    parts = [rows for process in batch.split for rows in process]
    part = np.empty(batch.size, dtype=np.int64)
    for number, rows in enumerate(parts):
        part[list(rows)] = number
    _, group = np.unique(batch.group_ids, return_inverse=True)
    return group.reshape(-1) * len(parts) + part


def expected(problem: TrainerProblem) -> Loop:
    """The loop after all batches.

    Example:
        >>> from pcr_conformance.trainers import make_problem
        >>> problem = make_problem(0, steps=2)
        >>> loop = expected(problem)
        >>> sorted(loop.weights), len(loop.statistics)
        (['down', 'embed', 'head', 'up'], 2)
    """
    loop = Loop(dict(problem.weights))
    for batch in problem.batches:
        loop.step(problem, batch)
    return loop


def _norms(contribution: Floats) -> float:
    return float(np.linalg.norm(contribution.reshape(len(contribution), -1), axis=1).sum())
