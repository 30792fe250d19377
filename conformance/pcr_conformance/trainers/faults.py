"""What can be wrong in a training stack: replacements for methods of `LoopTrainer`, which take their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import pcr_core as pcr
from pcr_conformance.trainers.problem import Rows, TrainerBatch, TrainerProblem, TrainerResult
from pcr_conformance.trainers.stacks.numpy import LoopTrainer, State, Sums, Totals

right = LoopTrainer()


def given(**changes: Callable[[TrainerProblem, TrainerBatch], Any]) -> Callable[..., Any]:
    """A microbatch whose fields are others: the objective sees them, and all else is right."""

    def objective(problem: TrainerProblem, part: TrainerBatch, now: Any, normalizer: float) -> Any:
        other = replace(part, **{name: change(problem, part) for name, change in changes.items()})
        return right.objective(problem, other, now, normalizer)

    return objective


def another(**changes: Callable[[TrainerProblem], Any]) -> Callable[..., Any]:
    """A run of another problem."""

    def train(problem: TrainerProblem, checkpoint: Any = None) -> TrainerResult:
        return right.train(replace(problem, **{k: change(problem) for k, change in changes.items()}), checkpoint)

    return train


def normalized(count: Callable[[TrainerProblem, TrainerBatch, float], float]) -> Callable[..., Any]:
    def objective(problem: TrainerProblem, part: TrainerBatch, now: Any, normalizer: float) -> Any:
        return right.objective(problem, part, now, count(problem, part, normalizer))

    return objective


def of_the_part(problem: TrainerProblem, part: TrainerBatch, normalizer: float) -> float:
    return problem.normalizer(part)


def of_columns(problem: TrainerProblem, part: TrainerBatch, normalizer: float) -> float:
    return normalizer / problem.longest * part.mask.shape[1] if problem.normalization == "dr_grpo" else normalizer


def every_token(problem: TrainerProblem, part: TrainerBatch, normalizer: float) -> float:
    return normalizer * part.mask.size / part.mask.sum() if problem.normalization == "dapo" else normalizer


def mean_over_microbatches(problem: TrainerProblem, state: State, batch: TrainerBatch, parts: Sequence[Rows]) -> Sums:
    return scaled(right.process(problem, state, batch, parts), 1 / len(parts))


def scaled(sums: Sums, t: float) -> Sums:
    return Sums(
        {k: t * v for k, v in sums.plasticity.items()},
        {k: t * v for k, v in sums.stability.items()},
        t * t * sums.scatter,
    )


def some(which: slice) -> Callable[..., Any]:
    def process(problem: TrainerProblem, state: State, batch: TrainerBatch, parts: Sequence[Rows]) -> Sums:
        return right.process(problem, state, batch, parts[which])

    return process


def resolved_apart(problem: TrainerProblem, state: State, batch: TrainerBatch, parts: Sequence[Rows]) -> Sums:
    """The rule on each microbatch; what comes out stands in the place of P, beside an S of zero."""
    found = [right.microbatch(problem, state, batch, rows) for rows in parts]
    return as_plasticity([right.decide(problem, state, sums)[0] for sums in found], found)


def reduced_after(sums: Sequence[Sums]) -> Sums:
    return as_plasticity([plain_pcr(one) for one in sums], sums) if len(sums) > 1 else sums[0]


def plain_pcr(sums: Sums) -> Totals:
    """`pcr.PCR()` on one process's own sums, whatever the problem's rule."""
    update = {}
    for k, p in sums.plasticity.items():
        s = sums.stability[k]
        c, boost = float((p * s).sum()), 0.0
        if c < 0 and k in ("up", "down"):
            boost = min(-0.5 * c / float((s * s).sum()), 10.0)
        update[k] = p + (1 + boost) * s
    return update


def as_plasticity(updates: Sequence[Totals], found: Sequence[Sums]) -> Sums:
    names = updates[0].keys()
    return Sums(
        {k: sum(u[k] for u in updates) for k in names},  # type: ignore[misc]
        {k: 0 * updates[0][k] for k in names},
        sum((s.scatter for s in found[1:]), found[0].scatter),
    )


def summed_twice(sums: Sequence[Sums]) -> Sums:
    return scaled(right.reduce(sums), len(sums))


def averaged_twice(sums: Sequence[Sums]) -> Sums:
    return scaled(right.reduce(sums), 1 / len(sums))


def first_process(sums: Sequence[Sums]) -> Sums:
    return scaled(sums[0], len(sums))


def noise_averaged(sums: Sequence[Sums]) -> Sums:
    found = right.reduce(sums)
    return replace(found, scatter=found.scatter / len(sums))


def stability_not_reduced(sums: Sequence[Sums]) -> Sums:
    return replace(right.reduce(sums), stability={k: len(sums) * v for k, v in sums[0].stability.items()})


def noise_of_the_last(problem: TrainerProblem, state: State, batch: TrainerBatch, parts: Sequence[Rows]) -> Sums:
    last = right.microbatch(problem, state, batch, parts[-1])
    return replace(right.process(problem, state, batch, parts), scatter=last.scatter)


def one_stratum(part: TrainerBatch) -> Any:
    return 0 * part.group_ids


def sorted_ids(part: TrainerBatch) -> Any:
    return np.sort(part.group_ids)


def two_halves(part: TrainerBatch) -> Any:
    return np.arange(part.size) * 2 // part.size


def advantages_by_place(problem: TrainerProblem, part: TrainerBatch) -> Any:
    return pcr.group_advantages(part.rewards, np.sort(part.group_ids), scale="none")


def of_a_part(problem: TrainerProblem, part: TrainerBatch) -> Any:
    return pcr.group_advantages(part.rewards, part.group_ids, scale="none")


def standardised(problem: TrainerProblem, part: TrainerBatch) -> Any:
    return part.advantages / (part.advantages.std() + 1e-4)


def whole_width(problem: TrainerProblem, part: TrainerBatch) -> Any:
    return np.ones_like(part.mask)


def stops_at_the_second(problem: TrainerProblem, part: TrainerBatch) -> Any:
    return part.mask & (np.arange(part.mask.shape[1]) < problem.longest - 1)


def before_the_token(problem: TrainerProblem, state: State, batch: TrainerBatch, rows: Rows) -> Sums:
    """Logits of a token in place of those before it."""
    return right.microbatch(problem, state, replace(batch, tokens=np.roll(batch.tokens, 1, axis=1)), rows)


def stepped(change: Callable[[TrainerProblem, Totals, Totals], Totals]) -> Callable[..., Any]:
    def step(problem: TrainerProblem, weights: Totals, update: Totals) -> Totals:
        return right.step(problem, weights, change(problem, weights, update))

    return step


def clipped(problem: TrainerProblem, weights: Totals, update: Totals) -> Totals:
    norm = float(np.sqrt(sum((u * u).sum() for u in update.values())))
    return {k: u * min(1.0, 1.0 / norm) for k, u in update.items()}


def sign(problem: TrainerProblem, weights: Totals, update: Totals) -> Totals:
    return {k: u / (np.abs(u) + 1e-8) for k, u in update.items()}


def embedding_left_out(problem: TrainerProblem, weights: Totals, update: Totals) -> Totals:
    return update | {"embed": 0 * update["embed"]}


class Momentum:
    """What one call, or one step, leaves to the next."""

    def __init__(self) -> None:
        self.last: Totals = {}

    def __call__(self, problem: TrainerProblem, weights: Totals, update: Totals) -> Totals:
        kept = {k: u + 0.3 * self.last.get(k, 0 * u) for k, u in update.items()}
        self.last = kept
        return kept


def everywhere(problem: TrainerProblem, weights: Any, p: Totals, s: Totals) -> Totals:
    """The first block's weights for all that is trained."""
    return {k: weights.plasticity[0] * p[k] + weights.stability[0] * s[k] for k in p}


def first_block_only(problem: TrainerProblem, weights: Any, p: Totals, s: Totals) -> Totals:
    return right.combine(problem, weights, p, s) | {"down": p["down"] + s["down"]}


def blocks_swapped(problem: TrainerProblem, weights: Any, p: Totals, s: Totals) -> Totals:
    turned = replace(weights, plasticity=weights.plasticity[::-1], stability=weights.stability[::-1])
    return right.combine(problem, turned, p, s)


def no_sum_outside(problem: TrainerProblem, weights: Any, p: Totals, s: Totals) -> Totals:
    return right.combine(problem, weights, p, s) | {k: p[k] for k in ("embed", "head")}


def without_prior(state: State) -> Any:
    return State(state.weights)


def without_weights(problem: TrainerProblem, checkpoint: Any) -> State:
    begun = State(dict(problem.weights))
    return begun if checkpoint is None else replace(checkpoint, weights=begun.weights)


def without_variances(state: State) -> Any:
    unknown = np.full(2, np.inf)
    return state if state.variances is None else replace(state, variances=(unknown, unknown))


def in_place(problem: TrainerProblem, weights: Totals, update: Totals) -> Totals:
    for name in update:
        weights[name] -= problem.learning_rate * update[name]
    return weights


def prior_of_the_last_call() -> Callable[..., Any]:
    kept: list[State] = []

    class Kept(LoopTrainer):
        def begin(self, problem: TrainerProblem, checkpoint: Any) -> State:
            begun = super().begin(problem, checkpoint)
            return replace(kept[-1], weights=begun.weights) if kept and checkpoint is None else begun

        def checkpoint(self, state: State) -> Any:
            kept.append(state)
            return state

    return Kept().train


def reports_of(change: Callable[[Any], Any]) -> Callable[..., Any]:
    def train(problem: TrainerProblem, checkpoint: Any = None) -> TrainerResult:
        found = right.train(problem, checkpoint)
        return replace(found, statistics=[change(s) for s in found.statistics])

    return train
