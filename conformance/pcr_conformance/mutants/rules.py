"""Wrong rules in particular regimes: caps, gates, ties and margins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import pcr_core as pcr
from pcr_conformance.mutants.priors import only_if, shrinking
from pcr_conformance.mutants.wrong import Decision, Mutant, Stats
from pcr_core import Rule

_W = "weights_are_exact"


def _projected(change: Callable[[Any, Any, Any], Any]) -> Callable[[Stats, Rule], Decision]:
    """Another boost where a PCR projects."""

    def fault(stats: Stats, rule: Rule) -> Decision:
        w: Any = rule(stats)
        if not isinstance(rule, pcr.PCR) or shrinking(rule):
            return w  # type: ignore[no-any-return]
        anchor = 1.0 if rule.update == "anchored" else 0.0
        return replace(w, stability=anchor + change(w.stability - anchor, stats, rule))

    return fault


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda rule: isinstance(rule, kind)


def _pcr(rule: Rule) -> bool:
    return isinstance(rule, pcr.PCR)


def _uncapped(s: Any, rule: Any) -> Any:
    return replace(rule, max_boost=math.inf, update="literal")(s).stability


def _parts(s: Any, rule: Any) -> tuple[Any, Any]:
    """alpha and the gate."""
    w = rule(s)
    return w.alpha, w.conflict_probability if rule.gate == "probability" else w.conflict.astype(float)


RULES: tuple[Mutant, ...] = (
    Mutant(
        "cap before alpha",
        _W,
        "weights",
        _projected(
            lambda b, s, r: (
                _parts(s, r)[0]
                * np.minimum(np.where(_parts(s, r)[0] > 0, b / np.maximum(_parts(s, r)[0], 1e-300), 0), r.max_boost)
            )
        ),
    ),
    Mutant(
        "cap before the gate",
        _W,
        "weights",
        _projected(
            lambda b, s, r: (
                np.minimum(_uncapped(s, replace(r, gate="sign")), r.max_boost)
                * (_parts(s, r)[1] if r.gate == "probability" else 1)
            )
        ),
    ),
    Mutant(
        "cap of the literal update on the whole",
        _W,
        "weights",
        _projected(lambda b, s, r: np.minimum(b, max(r.max_boost - 1, 0)) if r.update == "literal" else b),
    ),
    Mutant(
        "cap of 0 is no cap",
        _W,
        "weights",
        lambda s, r: (replace(r, max_boost=math.inf) if isinstance(r, pcr.PCR) and r.max_boost == 0 else r)(s),
    ),
    Mutant(
        "infinite cap is 1000",
        _W,
        "weights",
        lambda s, r: (replace(r, max_boost=min(r.max_boost, 30.0)) if isinstance(r, pcr.PCR) else r)(s),
    ),
    Mutant(
        "boost with a margin", _W, "weights", _projected(lambda b, s, r: b * s.stability_sq / (s.stability_sq + 1e-8))
    ),
    Mutant(
        "boost of the cosine",
        _W,
        "weights",
        _projected(lambda b, s, r: np.where(b > 0, np.minimum(_parts(s, r)[0] * -r(s).cosine, r.max_boost), b)),
    ),
    Mutant("boost squared alpha", _W, "weights", _projected(lambda b, s, r: b * _parts(s, r)[0])),
    Mutant(
        "conflict where the cosine is below -0.1",
        _W,
        "weights",
        _projected(lambda b, s, r: np.where(r(s).cosine < -0.1, b, 0)),
    ),
    Mutant("no boost of P = -S", _W, "weights", _projected(lambda b, s, r: np.where(s.dot == -s.plasticity_sq, 0, b))),
    Mutant(
        "gate of both signs",
        _W,
        "weights",
        only_if(
            lambda r: _pcr(r) and r.gate == "probability",
            lambda w, s, r: replace(replace(r, gate="sign")(s), conflict_probability=w.conflict_probability),
        ),
    ),
    Mutant("gate squared", _W, "weights", _projected(lambda b, s, r: b * _parts(s, r)[1])),
    Mutant(
        "alpha is 0 where nothing is noisy",
        _W,
        "weights",
        only_if(
            _pcr, lambda w, s, r: replace(w, alpha=np.where(s.plasticity_var + s.stability_var == 0, 0.0, w.alpha))
        ),
    ),
    Mutant(
        "alpha with a margin",
        _W,
        "weights",
        only_if(
            lambda r: _pcr(r) and r.alpha == "variance",
            lambda w, s, r: replace(w, alpha=s.plasticity_var / (s.plasticity_var + s.stability_var + 1e-10)),
        ),
    ),
    Mutant(
        "alpha within [0.01, 0.99]",
        _W,
        "weights",
        only_if(_pcr, lambda w, s, r: replace(w, alpha=np.clip(w.alpha, 0.01, 0.99))),
    ),
    Mutant(
        "alpha of deviations",
        _W,
        "weights",
        lambda s, r: (
            r(replace(s, plasticity_var=np.sqrt(s.plasticity_var), stability_var=np.sqrt(s.stability_var)))
            if isinstance(r, pcr.PCR) and r.alpha == "variance"
            else r(s)
        ),
    ),
    Mutant(
        "alpha of the mean noise",
        _W,
        "weights",
        lambda s, r: (
            r(replace(s, plasticity_var=s.plasticity_var.mean() + 0 * s.size))
            if isinstance(r, pcr.PCR) and r.alpha == "variance"
            else r(s)
        ),
    ),
    Mutant(
        "snr is variance",
        _W,
        "weights",
        lambda s, r: (replace(r, alpha="variance") if isinstance(r, pcr.PCR) and r.alpha == "snr" else r)(s),
    ),
    Mutant(
        "snr of norms",
        _W,
        "weights",
        lambda s, r: (
            r(replace(s, plasticity_var=s.plasticity_var**2)) if isinstance(r, pcr.PCR) and r.alpha == "snr" else r(s)
        ),
    ),
    Mutant(
        "PCGrad of one length",
        _W,
        "weights",
        only_if(_is(pcr.PCGrad), lambda w, s, r: replace(w, plasticity=w.stability)),
    ),
    Mutant(
        "PCGrad averaged",
        _W,
        "weights",
        only_if(_is(pcr.PCGrad), lambda w, s, r: replace(w, plasticity=w.plasticity / 2, stability=w.stability / 2)),
    ),
    Mutant(
        "MGDA of equal gradients takes P",
        _W,
        "weights",
        only_if(
            _is(pcr.MGDA), lambda w, s, r: replace(w, plasticity=np.where(s.plasticity_sq == s.dot, 1.0, w.plasticity))
        ),
    ),
    Mutant(
        "MGDA with a margin",
        _W,
        "weights",
        only_if(
            _is(pcr.MGDA),
            lambda w, s, r: replace(
                w,
                plasticity=np.where(
                    (s.plasticity_sq > 0) & (s.stability_sq > 0),
                    np.clip((s.stability_sq - s.dot) / (s.plasticity_sq + s.stability_sq - 2 * s.dot + 1e-8), 0, 1),
                    w.plasticity,
                ),
            ),
        ),
    ),
    Mutant(
        "MGDA exchanged",
        _W,
        "weights",
        only_if(_is(pcr.MGDA), lambda w, s, r: replace(w, plasticity=w.stability, stability=w.plasticity)),
    ),
    Mutant(
        "MGDA doubled",
        _W,
        "weights",
        only_if(_is(pcr.MGDA), lambda w, s, r: replace(w, plasticity=2 * w.plasticity, stability=2 * w.stability)),
    ),
    Mutant(
        "fixed alpha is 1/2",
        _W,
        "weights",
        lambda s, r: (pcr.FixedAlpha(0.5) if isinstance(r, pcr.FixedAlpha) else r)(s),
    ),
    Mutant(
        "hard projection without S",
        _W,
        "weights",
        only_if(_is(pcr.HardProjection), lambda w, s, r: replace(w, stability=w.stability - 1)),
    ),
    Mutant(
        "no anchor where P is zero",
        _W,
        "weights",
        only_if(_is(pcr.NoAnchor), lambda w, s, r: replace(w, stability=np.where(s.plasticity_sq == 0, 1.0, 0.0))),
    ),
    Mutant(
        "one block's conflict for all",
        _W,
        "weights",
        lambda s, r: r(
            replace(s, dot=-np.abs(s.dot))
            if (s.dot < 0).all()
            else replace(s, dot=np.where(s.dot < 0, s.dot * 0.999, s.dot))
        ),
    ),
)
