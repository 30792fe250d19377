"""How much of the conflict that a run measured is real, and how much is sampling noise that both gradients share.

Reward and KL gradient come from the same responses, so their errors go together, and P.S is negative (or positive) by
v_ps on average where the true gradients have nothing to do with each other (math.md section 4, "Shared noise"). Every
rule measures this; `--rule grpo` does so and changes nothing. The estimate takes the responses of a group as
independent, and with group-normalised advantages they are only nearly so: see `benchmarks/shared_noise.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Meter:
    """The conflict of a run, over all its blocks and the steps in which the gradients' noise was measured.

    Attributes:
        noise_share: sum of v_ps over sum of P.S, both over the steps and blocks with P.S < 0; NaN without any. Below 0
            where the shared noise hides conflict, above 1 where it exceeds it. Since blocks are picked by a noisy P.S,
            the rest, 1 - noise_share, is still more than the true gradients' conflict.
        raw: blocks with P.S < 0 in more than half of the steps in which they have both gradients.
        debiased: the same with P.S - v_ps.
        chance: blocks that would be so if each sign were the toss of a coin.
        blocks: all blocks that had both gradients at some step.
        steps: steps whose noise was measured.
        run: all steps that were read.
    """

    noise_share: float
    raw: int
    debiased: int
    chance: float
    blocks: int
    steps: int
    run: int

    @property
    def sentence(self) -> str:
        """What the meter shows, in words."""
        if not self.steps and self.run:
            return "The noise of the gradients was not measured, so how much of the conflict it is remains unknown."
        if not self.blocks:
            return "No step had both a reward and a KL gradient, so no conflict was measured."
        if math.isnan(self.noise_share):
            return f"None of the {self.blocks} blocks was in conflict at any of {self.steps} steps."
        when = "over the run" if self.steps == self.run else f"in {self.steps} of {self.run} steps"
        return (
            f"Of the conflict measured {when}, {self.noise_share:.2f} is sampling noise that both gradients "
            f"share. Without it, {self.debiased} of {self.blocks} blocks are in conflict in more than half of the "
            f"steps (as measured: {self.raw}; if each sign were the toss of a coin: {self.chance:.0f})."
        )


def measure(rows: Sequence[Mapping[str, Any]]) -> Meter:
    """The meter of the rows of a metrics.jsonl; numbers that are not finite there are left out."""
    conflict = noise = 0.0
    opposed: defaultdict[str, list[tuple[bool, bool]]] = defaultdict(list)
    measured = [blocks for row in rows if "covariance" in (blocks := row.get("blocks", {}))]
    for blocks in measured:
        columns = (blocks.get(key, ()) for key in ("name", "dot", "covariance", "plasticity_sq", "stability_sq"))
        for name, dot, shared, plasticity, stability in zip(*columns, strict=True):
            if None in (dot, shared) or not (plasticity and stability):
                continue
            opposed[name].append((dot < 0, dot < shared))
            if dot < 0:
                conflict += dot
                noise += shared
    raw, debiased = (sum(2 * sum(s[i] for s in signs) > len(signs) for signs in opposed.values()) for i in (0, 1))
    chance = sum(_more_than_half(len(signs)) for signs in opposed.values())
    share = noise / conflict if conflict else math.nan
    return Meter(share, raw, debiased, chance, len(opposed), len(measured), len(rows))


def _more_than_half(tosses: int) -> float:
    """Probability that a fair coin shows heads in more than half of the tosses."""
    return (1 - (0 if tosses % 2 else math.comb(tosses, tosses // 2) / 2**tosses)) / 2
