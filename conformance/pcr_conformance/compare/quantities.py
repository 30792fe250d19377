"""What is compared of one problem: run it on an adapter, and measure an outcome against the reference or another's."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import pcr_core
from pcr_conformance.adapter import Adapter, capabilities, seen
from pcr_conformance.cases import Case, Floats, ObjectiveCase
from pcr_conformance.compare import problems, token_reference
from pcr_conformance.compare.reference import Reference, evaluate, update_error
from pcr_conformance.oracle import SUMS

RULE = pcr_core.PCR(alpha="variance")
_NUMBERS = (*SUMS, "alpha", "stability weight")
#: those that are as long as the problem, and come back in the input's dtype
VECTORS = ("update", "plasticity cotangent", "stability cotangent")
QUANTITIES = (*_NUMBERS, *VECTORS)


@dataclass(frozen=True)
class Outcome:
    """What one adapter made of one problem, by quantity."""

    numbers: dict[str, float]
    vectors: dict[str, Floats]

    def digest(self) -> str:
        """Equal for the same bits; NaN are all alike."""
        found = hashlib.sha256()
        for name, value in [*self.numbers.items(), *self.vectors.items()]:
            array = np.asarray(value, dtype=np.float64) + 0.0  # one zero
            found.update(name.encode() + np.where(np.isnan(array), np.nan, array).tobytes())
        return found.hexdigest()[:16]

    def same_bits(self, other: Outcome) -> bool:
        return self.numbers == other.numbers and all(
            np.array_equal(x, other.vectors[name], equal_nan=True) for name, x in self.vectors.items()
        )


class Problem(Protocol):
    """One problem in one dtype, with its reference."""

    def run(self, adapter: Adapter, backwards: bool = False) -> Outcome:
        """`backwards` takes the coordinates in reversed order and turns the vectors round again."""

    def errors(self, outcome: Outcome) -> dict[str, float]:
        """Relative to the reference."""

    def differences(self, one: Outcome, other: Outcome) -> dict[str, float]:
        """Measured as errors are."""


def refused(adapter: Adapter, regime: str, dtype: str) -> bool:
    """Whether the adapter does not take the dtype, or has no objective where the problem is of tokens."""
    return dtype not in adapter.dtypes or (
        regime in problems.TOKEN_REGIMES and "objective" not in capabilities(adapter)
    )


def posed(adapter: Adapter, drawn: Case | ObjectiveCase, dtype: str) -> Problem:
    """The problem as an adapter sees it that takes the dtype; the same for all that do."""
    if isinstance(drawn, ObjectiveCase):
        tokens = token_reference.as_seen(adapter, drawn, dtype)
        return Tokens(tokens, dtype, token_reference.cotangents(tokens))
    p, s = (seen(adapter, x, dtype) for x in (drawn.plasticity, drawn.stability))
    case = drawn.with_(plasticity=p, stability=s)
    return Gradients(case, dtype, evaluate(case, RULE))


@dataclass(frozen=True)
class Gradients:
    """Sums relative to the product of the norms they are made of, weights to themselves, the update in norm."""

    case: Case
    dtype: str
    reference: Reference

    def run(self, adapter: Adapter, backwards: bool = False) -> Outcome:
        case = self.case
        if backwards:
            case = case.with_(plasticity=case.plasticity[:, ::-1].copy(), stability=case.stability[:, ::-1].copy())
        got = adapter.resolve(case, RULE, self.dtype)
        numbers = {name: float(np.asarray(getattr(got.statistics, name))[0]) for name in SUMS}
        numbers |= {"alpha": float(got.weights.alpha[0]), "stability weight": float(got.weights.stability[0])}
        return Outcome(numbers, {"update": got.update[::-1] if backwards else got.update})

    def errors(self, outcome: Outcome) -> dict[str, float]:
        found = {name: _off(outcome.numbers[name], self._exact(name), self._scale(name)) for name in _NUMBERS}
        return found | {"update": update_error(self.case, self.reference, outcome.vectors["update"])}

    def differences(self, one: Outcome, other: Outcome) -> dict[str, float]:
        found = {name: _off(one.numbers[name], other.numbers[name], self._scale(name)) for name in _NUMBERS}
        return found | {"update": _distance(one.vectors["update"], other.vectors["update"])}

    def _exact(self, name: str) -> float:
        if name in SUMS:
            return self.reference.sums[SUMS[name]]
        return float(self.reference.pair.b if name == "stability weight" else self.reference.pair.alpha or 0)

    def _scale(self, name: str) -> float:
        return self.reference.scales[SUMS[name]] if name in SUMS else abs(self._exact(name))


@dataclass(frozen=True)
class Tokens:
    """Both cotangents, in norm."""

    case: ObjectiveCase
    dtype: str
    reference: tuple[Floats, Floats]

    def run(self, adapter: Adapter, backwards: bool = False) -> Outcome:
        case = self.case
        if backwards:
            turned: dict[str, Any] = {
                name: getattr(case, name)[:, ::-1].copy() for name in ("logp", "logp_old", "logp_ref", "mask")
            }
            case = ObjectiveCase(advantages=case.advantages, **turned, **case.options())
        got = adapter.objective(case, self.dtype)
        found = (got.plasticity_cotangent, got.stability_cotangent)
        return Outcome({}, {name: x[:, ::-1] if backwards else x for name, x in zip(VECTORS[1:], found)})

    def errors(self, outcome: Outcome) -> dict[str, float]:
        return {name: _distance(outcome.vectors[name], x) for name, x in zip(VECTORS[1:], self.reference)}

    def differences(self, one: Outcome, other: Outcome) -> dict[str, float]:
        return {name: _distance(one.vectors[name], other.vectors[name]) for name in VECTORS[1:]}


def _distance(x: Any, y: Any) -> float:
    """|x - y| / |y|"""
    off = float(np.linalg.norm(x - y))
    return (off / (float(np.linalg.norm(y)) or 1.0)) if math.isfinite(off) else math.inf


def _off(got: float, exact: float, scale: float) -> float:
    """|got - exact| / scale; infinite where `got` is not finite."""
    return abs(got - exact) / (scale or 1.0) if math.isfinite(got) else math.inf
