"""What a law is tried on: rules, normalisations and shapes in turn, by what the adapter declares."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import pcr_core as pcr
from pcr_conformance.trainers.adapter import TrainerAdapter
from pcr_conformance.trainers.problem import TrainerProblem
from pcr_conformance.trainers.problems import EQUAL, UNEQUAL, make_problem
from pcr_core import Rule

TEMPORAL = pcr.PCR(alpha="variance", prior=pcr.TemporalPrior(0.7))
#: (rule, the capability it needs); the first few cover all three kinds, and the first reads all three measures of the
#: noise and their size (of v_p and v_s most others read the ratio only)
RULES: tuple[tuple[Rule, str], ...] = (
    (pcr.PCR(alpha="variance", gate="probability", conflict="debiased"), "noise"),
    (pcr.PCR(), "rules"),
    (TEMPORAL, "state"),
    (pcr.HardProjection(), "rules"),
    (pcr.PCR(alpha="snr", max_boost=0.5), "noise"),
    (pcr.PCGrad(), "rules"),
    (pcr.PCR(alpha="variance", prior=pcr.ShrinkagePrior(), conflict="debiased"), "noise"),
    (pcr.MGDA(), "rules"),
    (pcr.PCR.paper(), "noise"),
    (pcr.PCR(update="literal"), "rules"),
    (pcr.NoAnchor(), "rules"),
)
COMPILED = 3  # rules for adapters that compile each


@dataclass
class Draw:
    """One example of a law: everything follows from the run's seed, the law's name and the example's number."""

    law: str
    seed: int
    number: int
    problem: TrainerProblem | None = field(default=None, init=False)  # the last that was made, for messages

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self._entropy)

    @property
    def _entropy(self) -> list[int]:
        return [self.seed, zlib.crc32(self.law.encode()), self.number]

    def rule(self, adapter: TrainerAdapter) -> Rule:
        """The next of the rules that the adapter can do; the plain sum where it can do no other."""
        rules = rules_of(adapter)
        return rules[self.number % len(rules)]

    def make(
        self, adapter: TrainerAdapter, groups: Sequence[int] | None = None, *, other: int = 0, **options: Any
    ) -> TrainerProblem:
        """A problem for this adapter; every second has groups of unequal size where it takes them.

        `other` > 0 gives others of the same kind.
        """
        rules, divisors = len(rules_of(adapter)), adapter.normalizations
        turn = self.number + self.number // math.lcm(rules, len(divisors))  # no rule meets one normalisation only
        options.setdefault("rule", self.rule(adapter))
        options.setdefault("normalization", divisors[turn % len(divisors)])
        uneven = "unequal_groups" in adapter.capabilities and (self.number + self.number // 2) % 2 == 1
        self.problem = make_problem([*self._entropy, other], groups=groups or (UNEQUAL if uneven else EQUAL), **options)
        return self.problem


def rules_of(adapter: TrainerAdapter) -> list[Rule]:
    """Those that the adapter can do, in order."""
    able = [rule for rule, need in RULES if need in adapter.capabilities]
    return (able[:COMPILED] if adapter.compiled else able) or [pcr.GRPO()]
