"""Candidate rules that use the noise estimates, against a constant alpha with a cap (docs/uncertainty.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.stats import norm

import pcr_core as pcr
from benchmarks.learning.bandit import Decision, Memoryless, Method, Params, Regime, Streams
from benchmarks.learning.experiment import Experiment, Results
from benchmarks.learning.experiments.bandit import place
from benchmarks.learning.paired import paired_interval
from benchmarks.learning.parts import Claim, Plot, Report, Table
from benchmarks.learning.suite import Suite
from benchmarks.learning.tables import (
    diagnostic_table,
    difference_table,
    measure_all,
    rates_plot,
    settings_table,
)

CAP = 10.0


def ratio(numerator: Array, denominator: Array) -> Array:
    """0 where the denominator is not positive."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1.0), 0.0)


def pulling(streams: Streams, stability: Array, extra: Params | None = None, state: Any = ()) -> Decision:
    """P + b S with this b, one number a block."""
    none = jax.tree.map(jnp.zeros_like, streams.plasticity)
    weights = replace(pcr.GRPO()(streams.statistics), stability=stability)
    return Decision(weights, none if extra is None else extra, state)


class Stateless:
    def start(self, params: Params) -> Any:
        return ()


@dataclass(frozen=True)
class NoiseConflict(Stateless):
    """A: counters the conflict that is shared sampling noise."""

    def decide(self, streams: Streams, progress: Array, state: Any) -> Decision:
        stats = streams.statistics
        boost = 0.5 * ratio(jnp.maximum(-stats.covariance, 0), stats.stability_sq)
        return pulling(streams, 1 + jnp.minimum(boost, CAP))


@dataclass(frozen=True)
class WienerAlong(Stateless):
    """B: keeps the share of the movement along S that is signal."""

    def decide(self, streams: Streams, progress: Array, state: Any) -> Decision:
        stats = streams.statistics
        signal = jnp.maximum((stats.dot - stats.covariance) ** 2 - streams.along, 0)
        alpha = 1 - ratio(signal, signal + streams.along)
        boost = alpha * ratio(jnp.maximum(-stats.dot, 0), stats.stability_sq)
        return pulling(streams, 1 + jnp.minimum(boost, CAP))


@dataclass(frozen=True)
class AdamMetric(Stateless):
    """C: conflict in the metric of the optimizer's preconditioner."""

    def decide(self, streams: Streams, progress: Array, state: Any) -> Decision:
        return pulling(streams, pcr.PCR(alpha=0.5, max_boost=CAP)(streams.metric).stability)


@dataclass(frozen=True)
class Pooled:
    """D: one decision for all blocks, from running means over steps."""

    decay: float = 0.9

    def start(self, params: Params) -> Any:
        return jnp.zeros(()), jnp.zeros(())

    def decide(self, streams: Streams, progress: Array, state: Any) -> Decision:
        stats = streams.statistics
        new = jnp.sum(stats.dot), jnp.sum(stats.stability_sq)
        c, square = (self.decay * old + (1 - self.decay) * x for old, x in zip(state, new))
        boost = jnp.minimum(0.5 * ratio(jnp.maximum(-c, 0), square), CAP)
        return pulling(streams, 1 + boost + jnp.zeros_like(stats.dot), state=(c, square))


@dataclass(frozen=True)
class FilteredPull:
    """E: the boost along a filtered S of earlier steps; `gain` None is the scalar Kalman filter's."""

    gain: float | None = None
    discount: float = 0.9

    def start(self, params: Params) -> Any:
        infinite = jnp.full((2,), jnp.inf)
        return jax.tree.map(jnp.zeros_like, params), infinite

    def decide(self, streams: Streams, progress: Array, state: Any) -> Decision:
        mean, variance = state
        boosts = []
        for p, m in zip(streams.plasticity, mean):
            boosts.append(jnp.minimum(0.5 * ratio(jnp.maximum(-jnp.sum(p * m), 0), jnp.sum(m * m)), CAP))
        extra = Params(*(b * m for b, m in zip(boosts, mean)))
        prior = pcr.TemporalPrior(self.discount).posterior(streams.statistics.stability_var, previous_variance=variance)
        gains = prior.gain if self.gain is None else jnp.full((2,), self.gain)
        mean = Params(*(m + g * (s - m) for m, g, s in zip(mean, gains, streams.stability)))
        return pulling(streams, jnp.ones_like(streams.statistics.dot), extra, (mean, prior.variance))


@dataclass(frozen=True)
class BayesDecision(Stateless):
    """F: the weight on S with the least expected square error."""

    def decide(self, streams: Streams, progress: Array, state: Any) -> Decision:
        stats = streams.statistics
        deviation = jnp.sqrt(streams.along)
        c = stats.dot - stats.covariance
        z = ratio(c, deviation)
        expected = jnp.where(deviation > 0, deviation * norm.pdf(z) - c * norm.cdf(-z), jnp.maximum(-c, 0))
        reliable = jnp.maximum(1 - ratio(stats.stability_var, stats.stability_sq), 0)
        return pulling(streams, reliable + jnp.minimum(0.5 * ratio(expected, stats.stability_sq), CAP))


@dataclass(frozen=True)
class Ramp(Stateless):
    """Control: a pull that grows with the step, and knows nothing."""

    def decide(self, streams: Streams, progress: Array, state: Any) -> Decision:
        return pulling(streams, 1 + 4 * progress**2 + jnp.zeros_like(streams.statistics.dot))


CONSTANT = "1/2, capped"
PLACES = {
    "base": place(Regime()),
    "noisy rewards": place(Regime(prompts=4, flips=0.3)),
    "groups of 2": place(Regime(group=2)),
    "both": place(Regime(prompts=4, group=2, flips=0.3)),
    "uneven": place(Regime(uneven=True)),
    "SGD": place(Regime(optimizer="sgd")),
}
NOISY = ("noisy rewards", "groups of 2", "both")
CANDIDATES: dict[str, Method] = {
    "A noise conflict": NoiseConflict(),
    "B Wiener along S": WienerAlong(),
    "C Adam's metric": AdamMetric(),
    "D pooled": Pooled(),
    "E filtered pull": FilteredPull(),
    "F Bayes decision": BayesDecision(),
}
CONTROLS: dict[str, Method] = {
    "GRPO": Memoryless(pcr.GRPO()),
    "E with a constant gain": FilteredPull(gain=0.1),
    "ramp": Ramp(),
}
SUITE = Suite(PLACES, {CONSTANT: Memoryless(pcr.PCR(alpha=0.5)), **CANDIDATES, **CONTROLS}, CONSTANT, fronts=False)


def report(results: Results) -> Report:
    measured = measure_all(SUITE, results)
    if not measured:
        return Report([])
    bold = "Units of 0.01; 95 % paired intervals over instances, bold where they exclude 0 (before any correction)."
    sections: list[Table | Plot] = [settings_table(SUITE, results)]
    for measure, title in (
        ("best", "Score at own best learning rate and beta"),
        ("rates", "Score averaged over a tenfold range of learning rates, own best beta"),
        ("slow", "Score at a tenth of the constant's best learning rate, own best beta"),
    ):
        for base in (CONSTANT, "GRPO"):
            sections.append(difference_table(SUITE, measured, measure, f"{title}, less that of {base}", bold, base))
    sections.append(diagnostic_table(SUITE, results, measured, list(SUITE.methods), "What was done"))
    sections.append(rates_plot(SUITE, measured, list(SUITE.methods), "rates"))
    claims = [
        Claim(f"{name} - {base}, {regime}, own best", paired_interval(of[name].best, of[base].best), base == CONSTANT)
        for name in CANDIDATES
        for base, places in ((CONSTANT, NOISY), ("GRPO", tuple(PLACES)))
        for regime, of in measured.items()
        if regime in places
    ]
    return Report(sections, claims)


EXPERIMENT = Experiment(
    name="uncertainty",
    question="Does any rule that uses the noise estimates beat a constant alpha of 1/2 with a cap under noise?",
    protocol=(
        "Problem, tuning and confirmation as in the experiment `bandit`, on other seeds; candidates, predictions and "
        "the criterion are in docs/uncertainty.md, written before any candidate was run. Regimes as there; both is 4 "
        "prompts of 2 responses with 30 % of rewards the wrong way round."
    ),
    selection_seeds=tuple(range(100, 132)),
    confirmation_seeds=tuple(range(2000, 2128)),
    jobs=SUITE.jobs,
    choose=SUITE.choose,
    report=report,
)
