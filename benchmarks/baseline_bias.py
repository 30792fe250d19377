"""What does a constant shift of the advantages do to GRPO's gradient, exactly: bias and variance?

    python benchmarks/baseline_bias.py

A policy over two symbols and an end, with logits that depend on the symbol before, answers in at most three tokens: 15
responses of three lengths. Every group of responses is enumerated, so nothing here is an estimate. A right response
contains "ab" or ends at once, as drawn for each policy. Notation as in docs/baseline.md.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
START, END, LONGEST = 2, 2, 3  # rows of the logits: after a, after b, at the start; columns: a, b, end
NORMALIZATIONS = ("dr_grpo", "dapo", "grpo")


@dataclass(frozen=True)
class Policy:
    """All responses: probability (15,), score (15, 9), length (15,) and reward (15,)."""

    probability: Array
    score: Array
    length: Array
    reward: Array

    @classmethod
    def random(cls, rng: np.random.Generator, spread: float = 1.0) -> Policy:
        table = rng.normal(size=(3, 3)) * spread
        table = np.exp(table) / np.exp(table).sum(1, keepdims=True)
        responses = list(itertools.chain(*(_of_length(t) for t in range(1, LONGEST + 1))))
        scores, probabilities = [], []
        for response in responses:
            score, chance = np.zeros((3, 3)), 1.0
            for before, token in zip((START, *response), response):
                score[before] -= table[before]
                score[before, token] += 1
                chance *= table[before, token]
            scores.append(score.ravel())
            probabilities.append(chance)
        follows = rng.random() < 0.5
        right = [(0, 1) in (r[:2], r[1:]) if follows else len(r) == 1 for r in responses]
        lengths = np.asarray([len(r) for r in responses], dtype=float)
        return cls(np.asarray(probabilities), np.asarray(scores), lengths, np.asarray(right, dtype=float))

    @property
    def solved(self) -> float:
        """Probability of a right response."""
        return float(self.probability @ self.reward)


def _of_length(tokens: int) -> list[tuple[int, ...]]:
    """Responses that end at this length: by the end symbol, or cut off."""
    bodies = itertools.product((0, 1), repeat=tokens - 1)
    last = (0, 1, END) if tokens == LONGEST else (END,)
    return [(*body, token) for body in bodies for token in last]


@dataclass(frozen=True)
class Exact:
    """Of one policy and normalisation, over all groups.

    Attributes:
        best: b* by (1), from the covariance of both totals.
        plain: by (2), from the responses' own norms.
        bias: |b* E Z|/|E P|.
        reduction: share of Var P taken away at `best`, and at `plain`.
        left_out: |b E Z'|/|E P|, where groups of equal rewards are not shifted.
    """

    best: float
    plain: float
    bias: float
    reduction: tuple[float, float]
    left_out: float


def exact(policy: Policy, group: int, normalization: str, *, scaled: bool, proportional: bool) -> Exact:
    """One prompt of `group` responses.

    Args:
        policy: see there.
        group: responses.
        normalization: one of NORMALIZATIONS.
        scaled: whether advantages are divided by the group's standard deviation.
        proportional: whether the shift is in inverse proportion to what the loss normalises by (h w constant), or 1.
    """
    drawn = np.asarray(list(itertools.product(range(policy.length.size), repeat=group)))
    chance = policy.probability[drawn].prod(1)
    reward, length = policy.reward[drawn], policy.length[drawn]
    advantage = reward - reward.mean(1, keepdims=True)
    if scaled:
        advantage = advantage / (reward.std(1, ddof=1, keepdims=True) + 1e-4)
    w = {
        "dr_grpo": np.full_like(length, 1 / (group * LONGEST)),
        "dapo": 1 / length.sum(1, keepdims=True) + np.zeros_like(length),
        "grpo": 1 / (group * length),
    }[normalization]
    h = 1 / (w * group * LONGEST) if proportional else np.ones_like(w)
    score = policy.score[drawn]
    y_sq = w**2 * (score**2).sum(2)

    def total(factor: Array) -> Array:
        return np.einsum("gi,gid->gd", factor, score)

    p, z = total(advantage * w), total(h * w)
    mean_p, mean_z = chance @ p, chance @ z

    def covariance(x: Array, y: Array) -> float:
        return float(chance @ ((x - chance @ x) * (y - chance @ y)).sum(1))

    var_p, var_z, both = covariance(p, p), covariance(z, z), covariance(p, z)
    best = both / var_z
    plain = float(chance @ (advantage * h * y_sq).sum(1)) / float(chance @ (h**2 * y_sq).sum(1))
    differ = (np.ptp(reward, axis=1) > 0)[:, None]
    mean_left = chance @ total(h * w * differ)
    size = float(np.linalg.norm(mean_p))
    return Exact(
        best,
        plain,
        abs(best) * float(np.linalg.norm(mean_z)) / size,
        tuple((2 * b * both - b**2 * var_z) / var_p for b in (best, plain)),  # type: ignore[arg-type]
        abs(best) * float(np.linalg.norm(mean_left)) / size,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=int, default=100, help="random policies a row (default: %(default)s)")
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 3, 4], help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    columns = ("advantages", "n", "normalisation", "h", "b*", "(2) - (1)", "bias at b*, % of E P",
               "variance taken away, %", "by (2), %", "bias if equal rewards are left out, %")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for scaled, group, normalization in itertools.product((True, False), arguments.groups, NORMALIZATIONS):
        for proportional in (False, True):
            if normalization == "dr_grpo" and proportional:  # the same
                continue
            rng = np.random.default_rng(arguments.seed)
            policies = [Policy.random(rng) for _ in range(arguments.policies)]
            found = [exact(p, group, normalization, scaled=scaled, proportional=proportional) for p in policies]
            cells = (
                _spread([f.best for f in found]),
                _spread([f.plain - f.best for f in found]),
                _spread([100 * f.bias for f in found], 1),
                _spread([100 * f.reduction[0] for f in found], 1),
                _spread([100 * f.reduction[1] for f in found], 1),
                _spread([100 * f.left_out for f in found], 1),
            )
            how = "over the deviation" if scaled else "differences"
            h = "1 / (n L w)" if proportional else "1"
            print(f"| {how} | {group} | {normalization} | {h} | {' | '.join(cells)} |")
    print("\nMedian over policies, and the range of the middle 80 %.")


def _spread(values: list[float], digits: int = 2) -> str:
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()
