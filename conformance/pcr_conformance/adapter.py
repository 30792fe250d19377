"""What an implementation has to offer so that the laws can check it: NumPy in, NumPy out.

A law knows no framework. It hands an adapter a case and a dtype name, and judges the NumPy records that come back.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from pcr_conformance.cases import Case, Floats, ObjectiveCase
from pcr_conformance.rounding import ANY_ORDER, Arithmetic, Summation
from pcr_core import BlockStatistics, Objective, Rule, Weights


@dataclass(frozen=True)
class Resolved:
    """One resolved case, each array as NumPy float64 (which holds every narrower float exactly).

    `dtype` and `device` are those that the update had before it was copied. Two facts are for adapters that declare
    the capability: `in_input_memory`, whether the update lies where the plasticity total was, which nobody needs again;
    `sharding_kept`, whether every block of the update is split over the devices as the totals were.
    """

    update: Floats
    weights: Weights[Any]
    statistics: BlockStatistics[Any]
    dtype: str
    device: str
    in_input_memory: bool = False
    sharding_kept: bool = False


Capability = Literal["objective", "grad", "compile", "sharded", "in_place", "float64", "bfloat16"]
CAPABILITIES: frozenset[str] = frozenset(get_args(Capability))
NEEDS_PLAIN: frozenset[str] = frozenset({"compile", "sharded", "in_place"})


class Adapter(Protocol):
    """An implementation of PCR under check.

    Four methods and a name are needed; `Defaults` supplies the rest, and `dense.DenseAdapter` all of it for an array
    library that pcr_core itself can run on.

    Attributes:
        name: for reports.
        dtypes: names of the input dtypes it takes, widest first.
        accumulator: "float64" or "float32", in which sums are formed.
        summation: the order in which coordinates are added up, on which the error bounds depend.
            Summation("any") is always safe to declare: it has the widest bound.
        device: where its arrays lie by default.
        capabilities: what else it can do; each selects laws. "float64" and "bfloat16" follow from `dtypes`.
        compiled: whether each new shape or rule costs a compilation (checks then use fewer shapes).
        plain: the same method without what "compile", "sharded" or "in_place" adds (eager, on one device, out of
            place), to compare with; None for an adapter without these capabilities.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtypes(self) -> tuple[str, ...]: ...
    @property
    def accumulator(self) -> str: ...
    @property
    def summation(self) -> Summation: ...
    @property
    def device(self) -> str: ...
    @property
    def capabilities(self) -> frozenset[str]: ...
    @property
    def compiled(self) -> bool: ...
    @property
    def plain(self) -> Adapter | None: ...

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


class Defaults:
    """What an adapter need not write: one dtype, float64 sums in any order, eager, no capability."""

    dtypes: tuple[str, ...] = ("float64",)
    accumulator = "float64"
    summation: Summation = ANY_ORDER
    device = "cpu"
    capabilities: frozenset[str] = frozenset()
    compiled = False
    plain: Any = None
    software = ""  # name and version of what it computes with, for reports

    def objective(self, case: ObjectiveCase, dtype: str) -> Objective[Any]:
        raise NotImplementedError("this adapter has no objective of its own")

    def autodiff(self, case: ObjectiveCase, dtype: str) -> tuple[Any, Any] | None:
        return None


def capabilities(adapter: Adapter) -> frozenset[str]:
    """What it declares, and what its dtypes say."""
    return frozenset(adapter.capabilities) | (frozenset(adapter.dtypes) & CAPABILITIES)


def missing_members(adapter: Any) -> list[str]:
    """What an object lacks of the protocol, each as a line that names the signature to write."""
    lines = []
    for name, member in vars(Adapter).items():
        if name.startswith("_"):
            continue
        if inspect.isfunction(member):
            signature = str(inspect.signature(member)).replace("'", "")
            if not callable(getattr(adapter, name, None)):
                lines.append(f"method {name}{signature}")
        elif isinstance(member, property) and not hasattr(adapter, name):
            lines.append(f"attribute {name}: {inspect.signature(member.fget).return_annotation}")  # type: ignore[arg-type]
    unknown = frozenset(getattr(adapter, "capabilities", ())) - CAPABILITIES
    if unknown:
        lines.append(f"capabilities: {sorted(unknown)} are not among {sorted(CAPABILITIES)}")
    if not isinstance(getattr(adapter, "summation", ANY_ORDER), Summation):
        lines.append(f"summation: expected a pcr_conformance.rounding.Summation, got {adapter.summation!r}")
    if getattr(adapter, "plain", None) is None and NEEDS_PLAIN & frozenset(getattr(adapter, "capabilities", ())):
        lines.append("plain: an adapter to compare with, which compile, sharded and in_place need")
    return lines


def seen(adapter: Adapter, x: Any, dtype: str) -> Floats:
    """`x` as the implementation sees it: rounded to `dtype`."""
    rounded: Floats = adapter.to_numpy(adapter.from_numpy(x, dtype))
    return rounded


def arithmetic(adapter: Adapter) -> Arithmetic:
    """What it declares of its sums."""
    return Arithmetic(adapter.accumulator, adapter.summation)


def largest_exponent(adapter: Adapter, dtype: str) -> int:
    """Powers of ten up to which contributions can be scaled, both ways, with squares and their products in range."""
    if dtype == "float16":
        return 1
    return 18 if adapter.accumulator == "float64" else 7
