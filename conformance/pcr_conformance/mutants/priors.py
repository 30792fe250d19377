"""Wrong rules with a prior, or with the product that is free of shared noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import pcr_core as pcr
from pcr_conformance.mutants.wrong import Decision, Mutant, Stats
from pcr_core import Rule

_W = "weights_are_exact"


def shrinking(rule: Rule) -> bool:
    return isinstance(rule, pcr.PCR) and isinstance(rule.prior, pcr.ShrinkagePrior)


def _debiased(rule: Rule) -> bool:
    return isinstance(rule, pcr.PCR) and rule.conflict == "debiased"


def _gains(s: Any) -> tuple[Any, Any]:
    prior = pcr.ShrinkagePrior()
    return (
        prior.posterior(s.plasticity_sq, s.plasticity_var).gain,
        prior.posterior(s.stability_sq, s.stability_var).gain,
    )


def only_if(when: Callable[[Any], bool], change: Callable[[Any, Any, Any], Decision]) -> Callable[[Any, Any], Decision]:
    def fault(stats: Stats, rule: Rule) -> Decision:
        w = rule(stats)
        return change(w, stats, rule) if when(rule) else w

    return fault


PRIORS: tuple[Mutant, ...] = (
    Mutant(
        "gain applied twice", _W, "weights", only_if(shrinking, lambda w, s, r: replace(w, plasticity=w.plasticity**2))
    ),
    Mutant(
        "gain of S applied twice",
        _W,
        "weights",
        only_if(shrinking, lambda w, s, r: replace(w, stability=w.stability * _gains(s)[1])),
    ),
    Mutant(
        "prior on P alone",
        _W,
        "weights",
        only_if(shrinking, lambda w, s, r: replace(replace(r, prior=pcr.FlatPrior())(s), plasticity=w.plasticity)),
    ),
    Mutant(
        "square root of the gain",
        _W,
        "weights",
        only_if(shrinking, lambda w, s, r: replace(w, plasticity=np.sqrt(w.plasticity))),
    ),
    Mutant(
        "gain without its positive part's zero",
        _W,
        "weights",
        only_if(shrinking, lambda w, s, r: replace(w, plasticity=np.maximum(w.plasticity, 0.01))),
    ),
    Mutant(
        "gain of ridge",
        _W,
        "weights",
        only_if(
            shrinking,
            lambda w, s, r: replace(
                w, plasticity=s.plasticity_sq / np.maximum(s.plasticity_sq + s.plasticity_var, 1e-300)
            ),
        ),
    ),
    Mutant(
        "alpha of the prior's variances",
        _W,
        "weights",
        only_if(shrinking, lambda w, s, r: replace(w, alpha=replace(r, prior=pcr.FlatPrior())(s).alpha)),
    ),
    Mutant(
        "shared noise not shrunk",
        _W,
        "weights",
        lambda s, r: r(replace(s, covariance=s.covariance * 1.5)) if shrinking(r) else r(s),
    ),
    Mutant(
        "debiased by the gate alone", _W, "weights", only_if(_debiased, lambda w, s, r: replace(w, conflict=s.dot < 0))
    ),
    Mutant(
        "boost of the raw product",
        _W,
        "weights",
        only_if(
            _debiased,
            lambda w, s, r: replace(
                w, stability=np.where(w.conflict, replace(r, conflict="raw")(s).stability, w.stability)
            ),
        ),
    ),
    Mutant(
        "debiased twice",
        _W,
        "weights",
        lambda s, r: r(replace(s, covariance=2 * s.covariance)) if _debiased(r) else r(s),
    ),
    Mutant(
        "debiased with the other sign",
        _W,
        "weights",
        lambda s, r: r(replace(s, covariance=-s.covariance)) if _debiased(r) else r(s),
    ),
    Mutant(
        "debiased squares too",
        _W,
        "weights",
        lambda s, r: (
            r(replace(s, stability_sq=np.maximum(s.stability_sq - s.stability_var, 0))) if _debiased(r) else r(s)
        ),
    ),
    Mutant(
        "debiased with literal ignored",
        _W,
        "weights",
        lambda s, r: (replace(r, conflict="raw") if _debiased(r) and r.update == "literal" else r)(s),
    ),
)
