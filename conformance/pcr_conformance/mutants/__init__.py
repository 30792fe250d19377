"""Wrong implementations: the suite's own test."""

from pcr_conformance.mutants.wrong import MUTANTS, Mutant, Wrong, attack, combined

__all__ = ["MUTANTS", "Mutant", "Wrong", "attack", "combined"]
