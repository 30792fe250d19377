"""Long vectors to compare on, by regime and seed: gradients of three responses in one block, or tokens of four."""

from __future__ import annotations

import numpy as np

from pcr_conformance.cases import Case, ObjectiveCase

GROUPS = np.asarray([0, 0, 0])

#: name: cosine of the two totals, about
REGIMES: dict[str, float] = {
    "conflict": -0.3,
    "agreement": 0.3,
    "nearly orthogonal": 0.0,
    "nearly antiparallel": -1.0,
    "one huge coordinate": -0.3,
}

#: name: spread of logp_ref - logp, in nats, and which estimate of the KL
TOKEN_REGIMES: dict[str, tuple[float, str]] = {
    "tokens off policy": (0.5, "k3"),
    "tokens near the reference": (1e-3, "k3"),
    "tokens with the ratio in the KL": (0.5, "k3_ratio"),
}


def problem(regime: str, size: int, seed: int) -> Case:
    """Contributions (3, size) to both gradients in float64, the second stream 30 times smaller.

    Raises:
        ValueError: an unknown regime, or a size below 1.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime: expected one of {', '.join(REGIMES)}, got {regime!r}")
    if size < 1:
        raise ValueError(f"size: expected a positive number of coordinates, got {size}")
    rng = np.random.default_rng([seed, size, list(REGIMES).index(regime)])
    cosine = REGIMES[regime]
    plasticity = rng.standard_normal((len(GROUPS), size))
    stability = rng.standard_normal((len(GROUPS), size))
    stability *= max(1 - cosine**2, 1e-6) ** 0.5
    stability += cosine * plasticity
    stability /= 30
    if regime == "one huge coordinate":
        plasticity[:, size // 2] *= 1e4
    return Case(plasticity, stability, GROUPS, (size,), regime=regime)


def tokens(regime: str, size: int, seed: int) -> ObjectiveCase:
    """Log-probabilities (4, size/4) of responses of different lengths, sampled by a policy a few steps old.

    Raises:
        ValueError: an unknown regime.
    """
    if regime not in TOKEN_REGIMES:
        raise ValueError(f"regime: expected one of {', '.join(TOKEN_REGIMES)}, got {regime!r}")
    length = max(size // 4, 1)
    rng = np.random.default_rng([seed, size, len(REGIMES) + list(TOKEN_REGIMES).index(regime)])
    logp = -rng.exponential(size=(4, length))
    logp_old = logp + 0.1 * rng.standard_normal((4, length))
    spread, kl = TOKEN_REGIMES[regime]
    logp_ref = logp + spread * rng.standard_normal((4, length))
    lengths = np.maximum(length * np.asarray([4, 3, 2, 4]) // 4, 1)
    mask = np.arange(length)[None, :] < lengths[:, None]
    advantages = np.asarray([1.2, -0.7, 0.3, -0.8])
    return ObjectiveCase(logp, logp_old, logp_ref, advantages, mask, beta=0.04, kl=kl, regime=regime)
