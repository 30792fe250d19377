"""How many wrong implementations the whole suite notices at a budget, and which live."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from multiprocessing import get_context

from pcr_conformance.adapter import Adapter
from pcr_conformance.libraries.numpy import NumpyAdapter
from pcr_conformance.mutants.generated import Generated
from pcr_conformance.mutants.wrong import Mutant
from pcr_conformance.registry import LAWS
from pcr_conformance.verdict import judge

#: the laws that judge most in least time come first; the order decides how soon a mutant dies, not whether
_FIRST = ("weights_are_exact", "what_is_resolved_is_reported", "statistics_are_exact", "objective_is_exact")


@dataclass(frozen=True)
class Outcome:
    """A wrong implementation, and the first law that noticed; None where it lives."""

    name: str
    law: str | None


def scored(
    mutants: Sequence[Mutant | Generated], examples: int = 100, seed: int = 0, jobs: int = 1
) -> Iterator[Outcome]:
    """Each against the suite until one law fails, in processes beside each other; in the order given."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork" if os.name == "posix" else "spawn")) as pool:
        yield from pool.map(partial(_one, examples=examples, seed=seed), mutants, chunksize=4)


def first_failure(adapter: Adapter, examples: int, seed: int) -> str | None:
    """The first law that does not hold, in the order of `_FIRST` and then of the registry."""
    order = sorted(LAWS, key=lambda law: _FIRST.index(law.name) if law.name in _FIRST else len(_FIRST))
    for budget, some in ((3, order[: len(_FIRST)]), (examples, order)):  # most die at once
        for law in some:
            if judge(law, adapter, min(budget, examples), seed, shrink=False).bad:
                return law.name
    return None


def equivalents() -> dict[str, str]:
    """Names of generated mutants that no input tells from the right one, each with the reason."""
    text = files("pcr_conformance.mutants").joinpath("equivalent.toml").read_text()
    return {name: table["reason"] for table in tomllib.loads(text).values() for name in table["mutants"]}


def _one(mutant: Mutant | Generated, examples: int, seed: int) -> Outcome:
    if isinstance(mutant, Generated):
        try:
            with mutant.active():
                return Outcome(mutant.name, first_failure(NumpyAdapter(), examples, seed))
        except SyntaxError:  # no implementation at all
            return Outcome(mutant.name, "compile")
    with nullcontext():
        return Outcome(mutant.name, first_failure(mutant.adapter(), examples, seed))
