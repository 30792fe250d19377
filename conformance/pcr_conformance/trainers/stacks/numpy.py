"""A training stack in NumPy, as others are built: microbatches add up, processes are averaged, a rule, an optimizer.

It is right by the laws; the wrong trainers of `mutants.py` replace one of its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import pcr_core
from pcr_conformance.trainers.adapter import TRAINER_CAPABILITIES, TrainerDefaults
from pcr_conformance.trainers.model import NAMES, contributions, logp
from pcr_conformance.trainers.problem import (
    Floats,
    Normalization,
    Rows,
    TrainerBatch,
    TrainerProblem,
    TrainerResult,
)
from pcr_core import BlockStatistics, TemporalPrior, Weights

Totals = dict[str, Floats]


@dataclass(frozen=True)
class State:
    """Of a run: weights, and by stream the last posterior means and variances of the blocks."""

    weights: Totals
    means: tuple[Totals, Totals] | None = None
    variances: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Sums:
    """Of some responses: both totals of every weight, and (3, blocks) v_p, v_s and v_ps."""

    plasticity: Totals
    stability: Totals
    scatter: Floats

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            {k: self.plasticity[k] + other.plasticity[k] for k in self.plasticity},
            {k: self.stability[k] + other.stability[k] for k in self.stability},
            self.scatter + other.scatter,
        )


class LoopTrainer(TrainerDefaults):
    """Float64; "processes" are shares of the batch that never meet but in `reduce`."""

    name = "numpy"
    capabilities = TRAINER_CAPABILITIES
    normalizations: tuple[Normalization, ...] = ("grpo", "dapo", "dr_grpo")
    dtype = "float64"
    software = f"numpy {np.__version__}"

    def train(self, problem: TrainerProblem, checkpoint: Any = None) -> TrainerResult:
        state, reports = self.begin(problem, checkpoint), []
        for batch in problem.batches:
            sums = self.reduce([self.process(problem, state, batch, parts) for parts in batch.split])
            update, state, statistics = self.decide(problem, state, sums)
            state = replace(state, weights=self.step(problem, state.weights, update))
            reports.append(statistics)
        return TrainerResult(state.weights, self.checkpoint(state), reports)

    def begin(self, problem: TrainerProblem, checkpoint: Any) -> State:
        return State(dict(problem.weights)) if checkpoint is None else checkpoint

    def checkpoint(self, state: State) -> Any:
        return state

    def process(self, problem: TrainerProblem, state: State, batch: TrainerBatch, parts: Sequence[Rows]) -> Sums:
        """The sums of one process over its microbatches."""
        first, *rest = (self.microbatch(problem, state, batch, rows) for rows in parts)
        return sum(rest, first)

    def microbatch(self, problem: TrainerProblem, state: State, batch: TrainerBatch, rows: Rows) -> Sums:
        part = batch.rows(rows)
        loss = self.objective(problem, part, logp(state.weights, part), problem.normalizer(batch))
        p = contributions(state.weights, part, loss.plasticity_cotangent)
        s = contributions(state.weights, part, loss.stability_cotangent)
        ids = self.strata(part)
        noise = [_scatter(p[b].reshape(len(rows), -1), s[b].reshape(len(rows), -1), ids) for b in problem.blocks]
        total_p, total_s = ({name: c[name].sum(0) for name in NAMES} for c in (p, s))
        return Sums(total_p, total_s, np.asarray(noise).T)

    def strata(self, part: TrainerBatch) -> Any:
        return part.group_ids

    def objective(self, problem: TrainerProblem, part: TrainerBatch, now: Floats, normalizer: float) -> Any:
        return pcr_core.grpo_objective(
            now,
            part.logp_old,
            part.logp_ref,
            part.advantages,
            part.mask,
            beta=problem.beta,
            clip=problem.clip,
            normalization=problem.normalization,
            normalizer=normalizer,
        )

    def reduce(self, sums: Sequence[Sums]) -> Sums:
        """Over processes; each has normalised by the whole batch."""
        first, *rest = sums
        return sum(rest, first)

    def decide(self, problem: TrainerProblem, state: State, sums: Sums) -> tuple[Totals, State, BlockStatistics[Any]]:
        """By name the update, the state with what a prior carries, and the statistics."""
        p, s, rule = dict(sums.plasticity), dict(sums.stability), problem.rule
        statistics = statistics_of(problem, p, s, sums.scatter)
        prior = getattr(rule, "prior", None)
        if isinstance(rule, pcr_core.PCR) and isinstance(prior, TemporalPrior):
            unknown = np.full(len(problem.blocks), np.inf)
            found = rule.posteriors(statistics, state.variances or (unknown, unknown))
            for stream, (total, posterior) in enumerate(zip((p, s), found, strict=True)):
                for i, b in enumerate(problem.blocks):
                    before = 0.0 if state.means is None else state.means[stream][b]
                    total[b] = posterior.gain[i] * total[b] + (1 - posterior.gain[i]) * before
            variances = (found[0].variance, found[1].variance)
            weights = rule.project(statistics_of(problem, p, s, np.stack([*variances, sums.scatter[2]])))
            state = replace(state, means=(p, s), variances=variances)
        else:
            weights = rule(statistics)
        return self.combine(problem, weights, p, s), state, statistics

    def combine(self, problem: TrainerProblem, weights: Weights[Any], p: Totals, s: Totals) -> Totals:
        update = {name: p[name] + s[name] for name in NAMES}
        for i, b in enumerate(problem.blocks):
            update[b] = weights.plasticity[i] * p[b] + weights.stability[i] * s[b]
        return update

    def step(self, problem: TrainerProblem, weights: Totals, update: Totals) -> Totals:
        return {name: weights[name] - problem.learning_rate * update[name] for name in NAMES}


def statistics_of(problem: TrainerProblem, p: Totals, s: Totals, scatter: Floats) -> BlockStatistics[Any]:
    def products(one: Totals, other: Totals) -> Any:
        return np.asarray([float((one[b] * other[b]).sum()) for b in problem.blocks])

    sizes = np.asarray([float(p[b].size) for b in problem.blocks])
    return BlockStatistics(products(p, p), products(s, s), products(p, s), scatter[0], scatter[1], scatter[2], sizes)


def _scatter(p: Floats, s: Floats, ids: Any) -> tuple[float, float, float]:
    """v_p, v_s and v_ps of one block, around the means of strata."""
    found = np.zeros(3)
    for stratum in np.unique(ids):
        rows = ids == stratum
        m = int(rows.sum())
        a, b = (c[rows] - c[rows].mean(axis=0) for c in (p, s))
        found += m / (m - 1) * np.asarray([(a * a).sum(), (b * b).sum(), (a * b).sum()])
    return float(found[0]), float(found[1]), float(found[2])
