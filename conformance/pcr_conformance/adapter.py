"""What an implementation has to offer so that the laws can check it: NumPy in, NumPy out.

A law knows no framework. It hands an adapter a case and a dtype name, and judges the NumPy records that come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pcr_conformance.cases import Case, Floats, ObjectiveCase
from pcr_core import BlockStatistics, Objective, Rule, Weights


@dataclass(frozen=True)
class Resolved:
    """One resolved case, each array as NumPy float64 (which holds every narrower float exactly).

    `dtype` and `device` are those that the update had before it was copied.
    """

    update: Floats
    weights: Weights[Any]
    statistics: BlockStatistics[Any]
    dtype: str
    device: str


class Adapter(Protocol):
    """An implementation of PCR under check.

    Attributes:
        name: for reports.
        dtypes: names of the input dtypes it takes, widest first.
        accumulator: "float64" or "float32", in which sums are formed.
        device: where its arrays lie by default.
        compiled: whether each new shape or rule costs a compilation (checks then use fewer shapes).
        eager: the same implementation without compilation, to compare with; None where this one is eager.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtypes(self) -> tuple[str, ...]: ...
    @property
    def accumulator(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def compiled(self) -> bool: ...
    @property
    def eager(self) -> Adapter | None: ...

    def from_numpy(self, x: Any, dtype: str) -> Any:
        """An array of the framework; `dtype` is "int" for ids, "bool" for masks, or a float's name."""

    def to_numpy(self, x: Any) -> Any:
        """Floats as float64, booleans as bool."""

    def resolve(self, case: Case, rule: Rule, dtype: str) -> Resolved:
        """The whole method on per-response contributions, given in `dtype`."""

    def statistics(self, case: Case, dtype: str) -> BlockStatistics[Any]:
        """The first half of it: sums per block."""

    def weights(self, statistics: BlockStatistics[Any], rule: Rule) -> Weights[Any]:
        """The second half: a rule on ready statistics, in the accumulator's dtype."""

    def objective(self, case: ObjectiveCase, dtype: str) -> Objective[Any]:
        """Losses and closed-form cotangents; raises NotImplementedError where it has no objective of its own."""

    def autodiff(self, case: ObjectiveCase, dtype: str) -> tuple[Floats, Floats] | None:
        """Derivatives of both losses by automatic differentiation; None where the framework has none."""


def seen(adapter: Adapter, x: Any, dtype: str) -> Floats:
    """`x` as the implementation sees it: rounded to `dtype`."""
    rounded: Floats = adapter.to_numpy(adapter.from_numpy(x, dtype))
    return rounded


def epsilon(dtype: str) -> float:
    """Spacing of a dtype at 1."""
    return {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]


def largest_exponent(adapter: Adapter, dtype: str) -> int:
    """Powers of ten up to which contributions can be scaled, both ways, with squares and their products in range."""
    if dtype == "float16":
        return 1
    return 18 if adapter.accumulator == "float64" else 7
