"""How good is the estimate of the noise that both gradients share, with advantages that a group normalises itself?

    python benchmarks/shared_noise.py

v_p, v_s and v_ps are unbiased for responses that are independent within their group. GRPO's advantages are not quite:
they share the group's mean and standard deviation. Here a softmax policy over 10 answers has drifted from its
reference; one group of responses is drawn again and again, so that the true variances and covariance of P and S can be
seen. The table compares them with the mean of the estimates, over random policies and right answers.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import pcr_core

ANSWERS, TOGETHER = 10, 50
PAIRS = ((0, 0), (1, 1), (0, 1))
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """Of one policy: traces of Var(P), Var(S), Cov(P, S), as estimated (mean) and as they are."""

    estimated: tuple[float, ...]
    true: tuple[float, ...]

    @property
    def correlations(self) -> tuple[float, float]:
        """Cov(P, S) over the true standard deviations: estimated and true."""
        scale = (self.true[0] * self.true[1]) ** 0.5
        return self.estimated[2] / scale, self.true[2] / scale


def measure(group: int, draws: int, rng: np.random.Generator) -> Found:
    """One random policy, drawn from `draws` times in groups of `group` responses."""
    reference = rng.normal(size=ANSWERS)
    policy = _log_softmax(reference + 0.3 * rng.normal(size=ANSWERS))
    reference = _log_softmax(reference)
    right = rng.integers(ANSWERS)
    parts = [_groups(group, rng, policy, reference, right) for _ in range(draws // TOGETHER)]
    estimated = np.mean([estimate for estimate, _ in parts], axis=0)
    totals = np.concatenate([total for _, total in parts], axis=1)
    centred = totals - totals.mean(1, keepdims=True)
    true = [float((centred[i] * centred[j]).sum() / (totals.shape[1] - 1)) for i, j in PAIRS]
    return Found(tuple(estimated.tolist()), tuple(true))


def _groups(
    group: int, rng: np.random.Generator, policy: Array, reference: Array, right: int
) -> tuple[list[float], Array]:
    """Estimates a group, (v_p, v_s, v_ps), and totals (2, TOGETHER, answers) of both streams."""
    answers = rng.choice(ANSWERS, size=TOGETHER * group, p=np.exp(policy))
    ids = np.arange(TOGETHER * group) // group
    advantages = pcr_core.group_advantages((answers == right).astype(float), ids)
    logp = policy[answers][:, None]
    objective = pcr_core.grpo_objective(
        logp, logp, reference[answers][:, None], advantages, np.ones_like(logp, dtype=bool), beta=1.0
    )
    score = np.eye(ANSWERS)[answers] - np.exp(policy)
    cotangents = (objective.plasticity_cotangent, objective.stability_cotangent)
    streams = np.stack([TOGETHER * cotangent * score for cotangent in cotangents])  # of a batch of one group
    totals = streams.reshape(2, TOGETHER, group, ANSWERS).sum(2)
    estimated = [
        float(pcr_core.stratified_covariance((streams[i] * streams[j]).sum(1), (totals[i] * totals[j]).sum(1), ids))
        / TOGETHER
        for i, j in PAIRS
    ]
    return estimated, totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=int, default=30, help="random policies a row (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=2000, help="groups drawn from each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    columns = (
        "responses a group",
        "v_p, estimate / truth",
        "v_s, the same",
        "correlation of noise",
        "estimate - truth",
    )
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|")
    for group in (4, 8, 16):
        rng = np.random.default_rng(arguments.seed)
        found = [measure(group, arguments.draws, rng) for _ in range(arguments.policies)]
        ratios = [np.array([f.estimated[i] / f.true[i] for f in found]) for i in (0, 1)]
        estimated, true = np.array([f.correlations for f in found]).T
        cells = (*map(_spread, ratios), _spread(true), _spread(estimated - true))
        print(f"| {group} | " + " | ".join(cells) + " |")
    print("\nMedian over policies, and the range of the middle 80 %.")


def _spread(values: Array) -> str:
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max()
    logp: Array = shifted - np.log(np.exp(shifted).sum())
    return logp


if __name__ == "__main__":
    main()
