"""Wrong implementations made by machine: the reference adapter on `pcr_core` with one or two formulas changed.

A change replaces the code of a function while the laws run, in a process of its own. The laws' reference shares no
arithmetic with these functions, so that it does not change with them.
"""

from __future__ import annotations

import ast
import inspect
import random
import textwrap
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import FunctionType
from typing import Any

from pcr_conformance import dense
from pcr_conformance.mutants.formulas import mutations
from pcr_core import objective, posterior, projection, rules, statistics

resolve: Any = import_module("pcr_core.resolve")  # the package has the function of that name

#: what computes between contributions or log-probabilities and the records; what checks arguments is not here
FUNCTIONS: tuple[Callable[..., Any], ...] = (
    statistics.contribution_statistics,
    statistics._centred,
    objective.group_membership,
    projection.ratio,
    projection.one_absent,
    projection.variance_alpha,
    projection.snr_alpha,
    projection.conflict_probability,
    projection._root,
    projection.soft_projection,
    projection.report,
    projection._noise_to_signal,
    posterior.ShrinkagePrior.posterior,
    posterior.FlatPrior.posterior,
    rules.PCR.posteriors,
    rules.PCR.project,
    rules.PCR.__call__,
    rules.GRPO.__call__,
    rules.NoAnchor.__call__,
    rules.HardProjection.__call__,
    rules.FixedAlpha.__call__,
    rules.PCGrad.__call__,
    rules.MGDA.__call__,
    rules._constant,
    resolve.resolve,
    resolve._spread,
    resolve._block_sums,
    objective.grpo_objective,
    objective._masked,
    objective._normalization,
    objective._at_least_one,
    objective.batch_normalizer,
    dense.resolve_flat,
    dense.statistics_flat,
)


AND = "; and "


@dataclass(frozen=True)
class Generated:
    """One or two functions, each with the source that replaces it."""

    name: str
    sources: tuple[tuple[int, str], ...]  # number of the function in FUNCTIONS, its new source

    def known(self, equivalents: Collection[str]) -> bool:
        """Whether each of its changes is among those."""
        return all(name in equivalents for name in self.name.split(AND))

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it is open every caller of the functions gets the wrong ones; not for several threads."""
        kept = []
        try:
            for number, source in self.sources:
                function: Any = FUNCTIONS[number]
                kept.append((function, function.__code__, function.__defaults__, function.__kwdefaults__))
                wrong = _compiled(function, source)
                function.__code__ = wrong.__code__
            yield
        finally:
            for function, code, defaults, keywords in reversed(kept):
                function.__code__, function.__defaults__, function.__kwdefaults__ = code, defaults, keywords


def singles() -> list[Generated]:
    """Every change of one place."""
    found = []
    for number, function in enumerate(FUNCTIONS):
        module = function.__module__.rsplit(".", 1)[-1]
        for what, mutant in mutations(_definition(function)):
            qualified = function.__qualname__.rpartition(".")[0]
            name = f"{module}.{qualified + '.' if qualified else ''}{what}"
            found.append(Generated(name, ((number, ast.unparse(mutant)),)))
    return found


def pairs(one_place: list[Generated], count: int, seed: int = 0) -> list[Generated]:
    """Changes of two functions at once, drawn without looking at what became of either."""
    rng = random.Random(seed)
    found: dict[str, Generated] = {}
    while len(found) < count:
        first, second = rng.sample(one_place, 2)
        if first.sources[0][0] != second.sources[0][0]:
            name = f"{first.name}{AND}{second.name}"
            found[name] = Generated(name, first.sources + second.sources)
    return list(found.values())


def chosen(one_place: int, two_places: int) -> list[Generated]:
    """So many changes of one place, spread evenly over all of them, and of two."""
    every = singles()
    count = min(one_place, len(every))
    some = [every[i * len(every) // count] for i in range(count)]
    return some + pairs(every, two_places)


def _definition(function: Callable[..., Any]) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return tree


def _compiled(function: Any, source: str) -> FunctionType:
    namespace: dict[str, Any] = dict(function.__globals__)
    exec(compile("from __future__ import annotations\n" + source, f"<{function.__name__}>", "exec"), namespace)
    made: FunctionType = namespace[function.__name__]
    return made
