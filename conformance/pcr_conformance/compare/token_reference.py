"""Cotangents of many tokens in 80-bit floats, by their closed form; the tests hold it to differences of the losses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pcr_conformance.adapter import Adapter, seen
from pcr_conformance.cases import Floats, ObjectiveCase

_CLEAR = 1e-5  # of a clip bound, beyond what rounding of float32 could carry a ratio across


def as_seen(adapter: Adapter, case: ObjectiveCase, dtype: str) -> ObjectiveCase:
    """Rounded to the dtype; tokens whose ratio then lies at a clip bound are taken as on policy."""
    logp, old, ref = (seen(adapter, x, dtype) for x in (case.logp, case.logp_old, case.logp_ref))
    ratio = np.exp(logp - old)
    near = np.abs(ratio - (1 - case.clip[0])) < _CLEAR
    near |= np.abs(ratio - (1 + case.clip[1])) < _CLEAR
    advantages = seen(adapter, case.advantages, dtype)
    return replace(case, logp=logp, logp_old=np.where(near, logp, old), logp_ref=ref, advantages=advantages)


def cotangents(case: ObjectiveCase) -> tuple[Floats, Floats]:
    """-A rho [passes the clip] norm, and -beta expm1(gap) norm or with the ratio in the KL -beta rho gap norm.

    For token ratios and GRPO's normalisation.
    """
    if (case.importance, case.normalization, case.normalizer) != ("token", "grpo", None):
        raise ValueError("the reference knows token ratios with normalization='grpo' alone")
    plasticity, stability = np.zeros((2, *case.logp.shape))
    n = len(case.logp)
    for i, where in enumerate(case.mask):  # row by row, for the sake of memory
        logp, old, ref = (x[i, where].astype(np.longdouble) for x in (case.logp, case.logp_old, case.logp_ref))
        norm = 1 / (np.longdouble(max(int(where.sum()), 1)) * n)
        ratio, advantage = np.exp(logp - old), np.longdouble(case.advantages[i])
        stopped = (ratio > 1 + case.clip[1]) if advantage > 0 else (ratio < 1 - case.clip[0])
        plasticity[i, where] = np.where(stopped, 0, -advantage * ratio * norm)
        pull = ratio * (ref - logp) if case.kl == "k3_ratio" else np.expm1(ref - logp)
        stability[i, where] = -np.longdouble(case.beta) * pull * norm
    return plasticity, stability
