"""Wrong weights: alpha, gate, cap, prior, and the rules that PCR is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import pcr_core as pcr
from pcr_conformance.mutants.wrong import Decision, Mutant, Stats
from pcr_core import Rule

_W = "weights_are_exact"


def _swap(stats: Stats, rule: Rule) -> Decision:
    return rule(replace(stats, plasticity_var=stats.stability_var, stability_var=stats.plasticity_var))


def _boost(change: Callable[[Any, Stats, Rule], Any], kinds: type = pcr.PCR) -> Callable[[Stats, Rule], Decision]:
    def fault(stats: Stats, rule: Rule) -> Decision:
        w = rule(stats)
        return replace(w, stability=change(w.stability, stats, rule)) if isinstance(rule, kinds) else w

    return fault


def _option(**changes: Any) -> Callable[[Stats, Rule], Decision]:
    """PCR that does not listen to one of its options."""
    return lambda stats, rule: (replace(rule, **changes) if isinstance(rule, pcr.PCR) else rule)(stats)


def _unclipped_gain(stats: Stats, rule: Rule) -> Decision:
    w = rule(stats)
    if not isinstance(rule, pcr.PCR) or not isinstance(rule.prior, pcr.ShrinkagePrior):
        return w
    return replace(w, plasticity=1 - stats.plasticity_var / np.maximum(stats.plasticity_sq, 1e-300))


def _wrong_tail(stats: Stats, rule: Rule) -> Decision:
    w = rule(stats)
    found: Any = w.conflict_probability
    if not (isinstance(rule, pcr.PCR) and rule.gate == "probability"):
        return replace(w, conflict_probability=1 - found)
    chance = np.clip(found, 1e-9, 1)
    return replace(w, stability=1 + (w.stability - 1) / chance * (1 - chance))


def _mgda_unclipped(stats: Stats, rule: Rule) -> Decision:
    w = rule(stats)
    if not isinstance(rule, pcr.MGDA):
        return w
    t = (stats.stability_sq - stats.dot) / (stats.plasticity_sq + stats.stability_sq - 2 * stats.dot)
    return replace(w, plasticity=t, stability=1 - t)


def _shortest_whatever_is_absent(stats: Stats, rule: Rule) -> Decision:
    w = rule(stats)
    if not isinstance(rule, pcr.MGDA):
        return w
    gap = stats.plasticity_sq + stats.stability_sq - 2 * stats.dot
    t = np.clip(np.where(gap == 0, 0.5, (stats.stability_sq - stats.dot) / gap), 0, 1)
    return replace(w, plasticity=t, stability=1 - t, removed=1 - t)


def _half_reported(stats: Stats, rule: Rule) -> Decision:
    """Projects with alpha = 1, and reports the alpha it was asked for."""
    w = rule(stats)
    return replace(replace(rule, alpha=1.0)(stats), alpha=w.alpha) if isinstance(rule, pcr.PCR) else w


DECISIONS: tuple[Mutant, ...] = (
    Mutant("alpha swapped", _W, "weights", _swap),
    Mutant("alpha swapped (monotone)", "alpha_is_a_fraction", "weights", _swap),
    Mutant(
        "sign of the conflict test", "no_conflict_is_the_plain_sum", "weights", lambda s, r: r(replace(s, dot=-s.dot))
    ),
    Mutant("unnormalised projection", _W, "weights", _boost(lambda b, s, r: 1 + (b - 1) * s.stability_sq)),
    Mutant("literal for anchored", _W, "weights", _option(update="literal")),
    Mutant("anchored for literal", "no_conflict_is_the_plain_sum", "weights", _option(update="anchored")),
    Mutant("no cap", "boost_is_capped", "weights", _option(max_boost=np.inf)),
    Mutant(
        "cap on b, not on b - 1",
        "boost_is_capped",
        "weights",
        _boost(lambda b, s, r: np.minimum(b, getattr(r, "max_boost", np.inf))),
    ),
    Mutant("unclipped shrinkage gain", _W, "weights", _unclipped_gain),
    Mutant("prior ignored", _W, "weights", _option(prior=pcr.FlatPrior(), conflict="raw")),
    Mutant("wrong tail of the gate", _W, "weights", _wrong_tail),
    Mutant("gate ignored", _W, "weights", _option(gate="sign")),
    Mutant("alpha always 1/2", _W, "weights", _option(alpha=0.5)),
    Mutant("alpha always 1", "conflict_keeps_its_fraction", "weights", lambda s, r: _half_reported(s, r)),
    Mutant(
        "projects without conflict",
        "no_conflict_is_the_plain_sum",
        "weights",
        lambda s, r: r(replace(s, dot=-abs(s.dot))),
    ),
    Mutant("projection too long", "projection_never_lengthens", "weights", _boost(lambda b, s, r: 3 * b)),
    Mutant(
        "MGDA rests at a zero stream", "one_stream_absent_is_the_plain_sum", "weights", _shortest_whatever_is_absent
    ),
    Mutant(
        "noise of a zero total projected",
        "one_stream_absent_is_the_plain_sum",
        "weights",
        lambda s, r: r(replace(s, plasticity_sq=np.maximum(s.plasticity_sq, 1e-300))),
    ),
    Mutant("MGDA unclipped", _W, "weights", _mgda_unclipped),
    Mutant("PCGrad one-sided", _W, "weights", lambda s, r: (pcr.HardProjection() if r == pcr.PCGrad() else r)(s)),
    Mutant(
        "finite flag always set",
        "non_finite_statistics_are_flagged",
        "weights",
        lambda s, r: replace(r(s), finite=s.size > 0),
    ),
    Mutant(
        "boost in absolute units", "scale_goes_through", "weights", _boost(lambda b, s, r: b + 1e-3 * s.plasticity_sq)
    ),
)
