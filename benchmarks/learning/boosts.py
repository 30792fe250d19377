"""PCR(1/2) taken apart: another S, another direction of the boost, another part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

import pcr_core as pcr
from benchmarks.learning.bandit import Decision, Params, Streams
from benchmarks.learning.expectations import (
    expected_plasticity,
    expected_stability,
    mean_score,
    other_actions,
    sampled_stability,
)

Pull = Literal["sampled", "expected", "noise", "other", "log"]


def pull(streams: Streams, kind: Pull) -> Params:
    """S as sampled, its expectation, the difference, S of other responses, or S of the estimator k3_ratio."""
    step = streams.step
    assert step is not None
    if kind == "sampled":
        return streams.stability
    if kind == "expected":
        return expected_stability(step)
    if kind == "noise":
        return _minus(streams.stability, expected_stability(step))
    if kind == "other":
        return sampled_stability(step, other_actions(step))
    return sampled_stability(step, step.actions, "k3_ratio")


@dataclass(frozen=True)
class Boost:
    """The update P + anchor + m X, in every block m = min(alpha max(-<P, Y>, 0)/|Y|^2, cap).

    Attributes:
        anchor: the S that is added once.
        along: X.
        sized: Y; None for X.
        part: of the boost that is added: "whole"; its "shift", the part along Z (over both blocks), which is what a
            shift of all advantages does; or the rest, "unshifted".
        alpha: 0 for no boost, which is GRPO with another S.
    """

    anchor: Pull = "sampled"
    along: Pull = "sampled"
    sized: Pull | None = None
    part: Literal["whole", "shift", "unshifted"] = "whole"
    alpha: float = 0.5
    cap: float = 10.0

    def start(self, params: Params) -> Any:
        return ()

    def decide(self, streams: Streams, progress: Array, state: Any) -> Decision:
        along, sized = pull(streams, self.along), pull(streams, self.sized or self.along)
        size = [
            jnp.minimum(self.alpha * _ratio(jnp.maximum(-jnp.sum(p * y), 0), jnp.sum(y * y)), self.cap)
            for p, y in zip(streams.plasticity, sized)
        ]
        boost = Params(*(m * x for m, x in zip(size, along)))
        if self.part != "whole":
            assert streams.step is not None
            score = mean_score(streams.step, streams.step.actions)
            shift = _ratio(_dot(boost, score), _dot(score, score))
            shifted = Params(*(shift * z for z in score))
            boost = shifted if self.part == "shift" else _minus(boost, shifted)
        extra = _plus(_minus(pull(streams, self.anchor), streams.stability), boost)
        return Decision(pcr.GRPO()(streams.statistics), extra, state)


@dataclass(frozen=True)
class Quieter:
    """A control that cannot be had: P with its sampling noise, known in closed form, times `kept`."""

    kept: float

    def start(self, params: Params) -> Any:
        return ()

    def decide(self, streams: Streams, progress: Array, state: Any) -> Decision:
        assert streams.step is not None
        noise = _minus(streams.plasticity, expected_plasticity(streams.step))
        extra = Params(*((self.kept - 1) * n for n in noise))
        return Decision(pcr.GRPO()(streams.statistics), extra, state)


PRODUCTS = (
    "noise_noise", "update_noise", "mean_mean", "update_mean", "boost_noise", "boost_mean", "pull_mean", "pull_noise",
    "shift", "on_step", "on_noise", "on_mean", "on_score", "on_other_score", "on_step_and_score", "on_pull_mean",
    "on_pull_noise",
)  # fmt: skip
"""What `watch` measures, in this order, over both blocks.

noise and mean are those of P: nu = P - E P and E P; boost is D = update - P - S. A_B is <A, B>; pull_mean and
pull_noise are |E S|^2 and |S - E S|^2. shift is the b of D's part along Z. on_X is the share of |D|^2 that lies along
X: P, nu, E P, Z, Z of other responses, the plane of P and Z, E S, S - E S.
"""


def watch(streams: Streams, update: Params) -> Array:
    """(k,) `PRODUCTS` of a step. Where there is no boost its shares are 0."""
    step = streams.step
    assert step is not None
    mean = expected_plasticity(step)
    noise = _minus(streams.plasticity, mean)
    boost = _minus(update, _plus(streams.plasticity, streams.stability))
    pull_mean = expected_stability(step)
    pull_noise = _minus(streams.stability, pull_mean)
    score, other = mean_score(step, step.actions), mean_score(step, other_actions(step))
    square = _dot(boost, boost)
    there = square > 1e-10 * _dot(update, update)  # else rounding

    def on(x: Params) -> Array:
        return jnp.where(there, _ratio(_dot(boost, x) ** 2, square * _dot(x, x)), 0.0)

    along = _ratio(_dot(score, streams.plasticity), _dot(streams.plasticity, streams.plasticity))
    rest = Params(*(z - along * p for z, p in zip(score, streams.plasticity)))
    return jnp.stack(
        [
            _dot(noise, noise),
            _dot(update, noise),
            _dot(mean, mean),
            _dot(update, mean),
            _dot(boost, noise),
            _dot(boost, mean),
            _dot(pull_mean, pull_mean),
            _dot(pull_noise, pull_noise),
            jnp.where(there, _ratio(_dot(boost, score), _dot(score, score)), 0.0),
            on(streams.plasticity),
            on(noise),
            on(mean),
            on(score),
            on(other),
            on(streams.plasticity) + on(rest),
            on(pull_mean),
            on(pull_noise),
        ]
    )


def _dot(a: Params, b: Params) -> Array:
    return jnp.sum(a.first * b.first) + jnp.sum(a.second * b.second)


def _plus(a: Params, b: Params) -> Params:
    return Params(*(x + y for x, y in zip(a, b)))


def _minus(a: Params, b: Params) -> Params:
    return Params(*(x - y for x, y in zip(a, b)))


def _ratio(numerator: Array, denominator: Array) -> Array:
    """0 where the denominator is not positive."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1.0), 0.0)
