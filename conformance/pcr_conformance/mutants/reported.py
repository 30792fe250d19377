"""Wrong reports: numbers that never enter the update, and the form in which records come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import pcr_core as pcr
from pcr_conformance.mutants.wrong import Decision, Mutant, Stats
from pcr_core import Rule

_W, _R = "weights_are_exact", "records_are_complete"


def _says(field: str, value: Callable[[Any, Any, Any], Any]) -> Callable[[Stats, Rule], Decision]:
    def fault(stats: Stats, rule: Rule) -> Decision:
        w = rule(stats)
        return replace(w, **{field: value(w, stats, rule)})

    return fault


def _product(s: Any) -> Any:
    return np.where(s.plasticity_sq * s.stability_sq > 0, s.dot / np.sqrt(s.plasticity_sq * s.stability_sq), 0.0)


def _raw(s: Any) -> Decision:
    return pcr.PCR(alpha="variance")(s)


def _over(x: Any, y: Any, empty: float) -> Any:
    return np.where(y == 0, empty, x / np.where(y == 0, 1, y))


def _report(name: str, field: str, value: Callable[[Any, Any, Any], Any], law: str = _W) -> Mutant:
    return Mutant(name, law, "weights", _says(field, value))


REPORTED: tuple[Mutant, ...] = (
    _report("cosine of a product that overflows", "cosine", lambda w, s, r: np.clip(np.nan_to_num(_product(s)), -1, 1)),
    _report(
        "cosine with a margin",
        "cosine",
        lambda w, s, r: s.dot / (np.sqrt(s.plasticity_sq) * np.sqrt(s.stability_sq) + 1e-12),
    ),
    _report("absolute cosine", "cosine", lambda w, s, r: np.abs(w.cosine)),
    _report("cosine squared", "cosine", lambda w, s, r: w.cosine**2),
    _report("cosine of nothing is 1", "cosine", lambda w, s, r: np.where(s.stability_sq == 0, 1.0, w.cosine)),
    _report("cosine of the means' debiased product", "cosine", lambda w, s, r: w.cosine - s.covariance * 1e-3),
    _report("removed left at 0", "removed", lambda w, s, r: 0 * w.removed),
    _report("removed is alpha", "removed", lambda w, s, r: w.alpha * w.conflict),
    _report("removed is the boost", "removed", lambda w, s, r: np.maximum(w.stability - 1, 0)),
    _report("removed squared", "removed", lambda w, s, r: w.removed**2),
    _report("removed at most 1", "removed", lambda w, s, r: np.minimum(w.removed, 0.5)),
    _report(
        "removed without the cap",
        "removed",
        lambda w, s, r: np.where(w.conflict, w.alpha * np.abs(w.cosine), w.removed),
    ),
    _report("removed of MGDA is a", "removed", lambda w, s, r: w.plasticity if isinstance(r, pcr.MGDA) else w.removed),
    _report(
        "removed of PCGrad left out",
        "removed",
        lambda w, s, r: 0 * w.removed if isinstance(r, pcr.PCGrad) else w.removed,
    ),
    _report(
        "noise to signal inverted", "plasticity_nsr", lambda w, s, r: _over(s.plasticity_sq, s.plasticity_var, 0.0)
    ),
    _report("noise to signal of norms", "stability_nsr", lambda w, s, r: np.sqrt(w.stability_nsr)),
    _report("noise to signal of P for both", "stability_nsr", lambda w, s, r: w.plasticity_nsr),
    _report("noise to signal of S for both", "plasticity_nsr", lambda w, s, r: w.stability_nsr),
    _report(
        "pure noise has no ratio",
        "plasticity_nsr",
        lambda w, s, r: np.where(s.plasticity_sq == 0, 0.0, w.plasticity_nsr),
    ),
    _report(
        "pure noise of S has no ratio",
        "stability_nsr",
        lambda w, s, r: np.where(s.stability_sq == 0, 0.0, w.stability_nsr),
    ),
    _report(
        "nothing over nothing is infinite",
        "stability_nsr",
        lambda w, s, r: np.where(s.stability_sq == 0, np.inf, w.stability_nsr),
    ),
    _report(
        "noise to signal with a margin", "plasticity_nsr", lambda w, s, r: s.plasticity_var / (s.plasticity_sq + 1e-8)
    ),
    _report("noise to signal a coordinate", "plasticity_nsr", lambda w, s, r: w.plasticity_nsr / s.size),
    _report(
        "noise to signal of the posterior",
        "plasticity_nsr",
        lambda w, s, r: w.plasticity_nsr * np.where(w.plasticity > 0, w.plasticity, 1),
    ),
    _report("noise to signal at most 1e6", "plasticity_nsr", lambda w, s, r: np.minimum(w.plasticity_nsr, 1e6)),
    _report("alpha after the gate", "alpha", lambda w, s, r: w.alpha * w.conflict),
    _report("alpha of a sum is 1/2", "alpha", lambda w, s, r: w.alpha + 0.5 if isinstance(r, pcr.GRPO) else w.alpha),
    _report("alpha of PCGrad is 0", "alpha", lambda w, s, r: 0 * w.alpha if isinstance(r, pcr.PCGrad) else w.alpha),
    _report(
        "alpha of MGDA is 1 - a", "alpha", lambda w, s, r: 1 - w.plasticity if isinstance(r, pcr.MGDA) else w.alpha
    ),
    _report("conflict of the raw product", "conflict", lambda w, s, r: s.dot < 0),
    _report("conflict of none", "conflict", lambda w, s, r: w.conflict & isinstance(r, pcr.PCR)),
    _report("conflict where orthogonal", "conflict", lambda w, s, r: w.conflict | (s.dot == 0)),
    _report("conflict left to chance", "conflict", lambda w, s, r: w.conflict_probability > 0.5),
    _report("probability of the raw product", "conflict_probability", lambda w, s, r: _raw(s).conflict_probability),
    _report(
        "probability without the dimension",
        "conflict_probability",
        lambda w, s, r: r(replace(s, size=0 * s.size + 1)).conflict_probability,
    ),
    _report(
        "probability is 1/2 where nothing is noisy",
        "conflict_probability",
        lambda w, s, r: np.where(s.plasticity_var + s.stability_var == 0, 0.5, w.conflict_probability),
    ),
    _report("probability is the flag", "conflict_probability", lambda w, s, r: w.conflict.astype(float)),
    _report("probability of the other tail", "conflict_probability", lambda w, s, r: 1 - w.conflict_probability),
    _report("conflict as numbers", "conflict", lambda w, s, r: w.conflict.astype(float), _R),
    _report("finite as integers", "finite", lambda w, s, r: w.finite.astype(int), _R),
    _report("cosine as float32", "cosine", lambda w, s, r: w.cosine.astype(np.float32), _R),
    _report("one alpha for all blocks", "alpha", lambda w, s, r: w.alpha[:1], _R),
    _report("one number for alpha", "alpha", lambda w, s, r: float(w.alpha[0]), _R),
    _report("removed for each block twice", "removed", lambda w, s, r: np.stack([w.removed, w.removed], -1), _R),
)
