"""Wrong implementations: the suite's own test."""

from pcr_conformance.mutants.combinations import COMBINATIONS
from pcr_conformance.mutants.decisions import DECISIONS
from pcr_conformance.mutants.priors import PRIORS
from pcr_conformance.mutants.remembered import REMEMBERED
from pcr_conformance.mutants.reported import REPORTED
from pcr_conformance.mutants.rules import RULES
from pcr_conformance.mutants.strata import STRATA
from pcr_conformance.mutants.sums import SUMS
from pcr_conformance.mutants.tokens import TOKENS
from pcr_conformance.mutants.wrong import Mutant, Wrong, combined
from pcr_conformance.registry import LAWS
from pcr_conformance.verdict import Verdict, judge

MUTANTS: tuple[Mutant, ...] = (
    *SUMS,
    *STRATA,
    *DECISIONS,
    *PRIORS,
    *RULES,
    *REPORTED,
    *COMBINATIONS,
    *TOKENS,
    *REMEMBERED,
)


def attack(mutant: Mutant, examples: int = 100, seed: int = 0) -> Verdict:
    """The named law on the mutant; failed means killed."""
    law = next(law for law in LAWS if law.name == mutant.law)
    return judge(law, mutant.adapter(), examples, seed, shrink=False)


__all__ = ["MUTANTS", "Mutant", "Wrong", "attack", "combined"]
