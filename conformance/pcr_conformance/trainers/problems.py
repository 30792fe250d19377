"""Random problems on which a wrong update shows: a conflict, ratios on both sides of the clip, unequal responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import pcr_core
from pcr_conformance.trainers.model import logp
from pcr_conformance.trainers.oracle import Loop
from pcr_conformance.trainers.problem import Floats, Normalization, Rows, TrainerBatch, TrainerProblem
from pcr_core import Rule

WORDS, FEATURES, HIDDEN, PROMPT, LONGEST = 7, 4, 5, 2, 4
CLIP = (0.2, 0.3)
RATIOS = (0.6, 0.75, 0.9, 1.05, 1.15, 1.25, 1.5)  # none so near the clip that rounding decides which side it is on
EQUAL = (4, 4, 4, 4)
UNEQUAL = (2, 5, 3, 4)


def make_problem(
    seed: Any,
    *,
    rule: Rule = pcr_core.PCR(),
    normalization: Normalization = "grpo",
    groups: Sequence[int] = EQUAL,
    steps: int = 1,
) -> TrainerProblem:
    """A problem in one microbatch on one process; groups lie one after the other.

    In its first step some block is in conflict, and P + 2 S is far from P + S.

    Args:
        seed: an integer, or a sequence of them.
        rule: any `pcr_core.Rule`.
        normalization: "grpo", "dapo" or "dr_grpo".
        groups: sizes of the groups, two or more responses each.
        steps: how many batches.

    Example:
        >>> problem = make_problem(0, groups=(2, 3), steps=2)
        >>> len(problem.batches), problem.batches[0].tokens.shape, problem.batches[0].group_ids.tolist()
        (2, (5, 6), [0, 0, 1, 1, 1])
    """
    rng = np.random.default_rng(seed)
    while True:
        weights = {
            "embed": rng.normal(size=(WORDS, FEATURES)),
            "up": rng.normal(size=(FEATURES, HIDDEN)) / 2,
            "down": rng.normal(size=(HIDDEN, FEATURES)) / 2,
            "head": rng.normal(size=(FEATURES, WORDS)) / 2,
        }
        first = _batch(rng, weights, groups)
        problem = TrainerProblem(weights, (first,), rule, 0.3, CLIP, normalization, LONGEST, 0.5)
        if _tells(problem):
            break
    batches, loop = [first], Loop(dict(weights))
    for _ in range(steps - 1):  # later ones are near the policy that has come about by then
        loop.step(problem, batches[-1])
        batches.append(_batch(rng, loop.weights, groups))
    return replace(problem, batches=tuple(batches))


def _batch(rng: Any, weights: dict[str, Floats], groups: Sequence[int]) -> TrainerBatch:
    n = sum(groups)
    group_ids: Any = np.repeat(np.arange(len(groups)), groups)
    chosen = rng.choice(WORDS**PROMPT, size=len(groups), replace=False)  # no two groups have one prompt
    prompts = np.stack(np.unravel_index(chosen, (WORDS,) * PROMPT), axis=1)[group_ids]
    tokens = np.concatenate([prompts, rng.integers(WORDS, size=(n, LONGEST))], axis=1)
    lengths = rng.integers(1, LONGEST + 1, size=n)
    lengths[:2] = 1, LONGEST
    rewards = rng.normal(size=n)
    unscored = TrainerBatch(
        tokens,
        PROMPT,
        np.arange(LONGEST) < lengths[:, None],
        group_ids,
        rewards,
        pcr_core.group_advantages(rewards, group_ids, scale="none"),
        np.zeros((n, LONGEST)),
        np.zeros((n, LONGEST)),
        ((tuple(range(n)),),),
    )
    now = logp(weights, unscored)
    old = now - np.log(rng.choice(RATIOS, size=now.shape))
    return replace(unscored, logp_old=old, logp_ref=now + 0.7 * rng.normal(size=now.shape))


def _tells(problem: TrainerProblem) -> bool:
    """Whether a block is in conflict and loses a part of P that cannot be taken for rounding."""
    found = Loop(dict(problem.weights))
    found.step(replace(problem, rule=pcr_core.PCR()), problem.batches[0])
    decided = pcr_core.PCR()(found.statistics[0])
    return bool((decided.removed > 0.1).any() and (found.statistics[0].stability_sq > 1e-6).all())


def with_split(problem: TrainerProblem, split: tuple[tuple[Rows, ...], ...]) -> TrainerProblem:
    """The same batches in other microbatches, or on other processes."""
    return replace(problem, batches=tuple(replace(batch, split=split) for batch in problem.batches))


def whole_groups(problem: TrainerProblem, parts: Sequence[Sequence[Sequence[int]]]) -> TrainerProblem:
    """Split by groups: `parts[process][microbatch]` are numbers of groups, in the order of their ids."""
    batch = problem.batches[0]
    ids = np.unique(batch.group_ids)
    split = tuple(
        tuple(tuple(int(i) for g in groups for i in np.flatnonzero(batch.group_ids == ids[g])) for groups in process)
        for process in parts
    )
    return with_split(problem, split)


def halved_groups(problem: TrainerProblem, processes: int, microbatches: int) -> TrainerProblem:
    """Every group in two parts, which lie in different microbatches or on different processes."""
    parts = processes * microbatches
    held: list[list[int]] = [[] for _ in range(parts)]
    batch = problem.batches[0]
    for number, g in enumerate(np.unique(batch.group_ids)):
        rows = [int(i) for i in np.flatnonzero(batch.group_ids == g)]
        half = len(rows) // 2
        held[number % parts] += rows[:half]
        held[(number + 1) % parts] += rows[half:]
    split = tuple(tuple(tuple(held[p * microbatches + m]) for m in range(microbatches)) for p in range(processes))
    return with_split(problem, split)
