"""Long vectors to compare on: four responses in two groups, one block, by regime and seed."""

from __future__ import annotations

import numpy as np

from pcr_conformance.cases import Case

GROUPS = np.asarray([0, 0, 1, 1])

#: name: cosine of the two totals, about
REGIMES: dict[str, float] = {
    "conflict": -0.3,
    "agreement": 0.3,
    "nearly orthogonal": 0.0,
    "nearly antiparallel": -1.0,
    "one huge coordinate": -0.3,
}


def problem(regime: str, size: int, seed: int) -> Case:
    """Contributions (4, size) to both gradients in float64, the second stream 30 times smaller.

    Raises:
        ValueError: an unknown regime, or a size below 1.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime: expected one of {', '.join(REGIMES)}, got {regime!r}")
    if size < 1:
        raise ValueError(f"size: expected a positive number of coordinates, got {size}")
    rng = np.random.default_rng([seed, size, list(REGIMES).index(regime)])
    cosine = REGIMES[regime]
    plasticity = rng.standard_normal((4, size))
    stability = rng.standard_normal((4, size))
    stability *= max(1 - cosine**2, 1e-6) ** 0.5
    stability += cosine * plasticity
    stability /= 30
    if regime == "one huge coordinate":
        plasticity[:, size // 2] *= 1e4
    return Case(plasticity, stability, GROUPS, (size,), regime=regime)
