"""Rewards, beta and learning rate are numbers that the update is proportional to, not settings that something hides."""

from __future__ import annotations

from dataclasses import replace

from pcr_conformance.trainers.adapter import TrainerAdapter
from pcr_conformance.trainers.checks import same_weights
from pcr_conformance.trainers.draw import Draw
from pcr_conformance.trainers.oracle import expected

SCALES = (16.0, 0.25, 1000.0)


def reward_scale_goes_through(adapter: TrainerAdapter, draw: Draw) -> None:
    """Rewards and beta times t, the learning rate divided by t: the same two steps. A clipped gradient shows here."""
    problem, t = draw.make(adapter, steps=2), SCALES[draw.number % len(SCALES)]
    batches = tuple(replace(b, rewards=t * b.rewards, advantages=t * b.advantages) for b in problem.batches)
    draw.problem = replace(problem, batches=batches, beta=t * problem.beta, learning_rate=problem.learning_rate / t)
    same_weights(draw.law, adapter, adapter.train(draw.problem), expected(problem))


def learning_rate_scales_the_step(adapter: TrainerAdapter, draw: Draw) -> None:
    """A step with another learning rate, held to the loop's; what is added to plain SGD shows here."""
    problem = draw.make(adapter)
    draw.problem = replace(problem, learning_rate=problem.learning_rate * (4.0 if draw.number % 2 else 0.25))
    same_weights(draw.law, adapter, adapter.train(draw.problem), expected(draw.problem))
