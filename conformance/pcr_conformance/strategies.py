"""The random cases of the laws as Hypothesis strategies, for tests of other things."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import strategies as st

from pcr_conformance.batches import objective_case
from pcr_conformance.cases import Case, Integers, ObjectiveCase
from pcr_conformance.drawing import Draw
from pcr_conformance.groups import group_ids as grouped
from pcr_conformance.regimes import case

T = TypeVar("T")


def cases(**options: Any) -> st.SearchStrategy[Case]:
    """`regimes.case`"""
    return _drawn(lambda draw: case(draw, **options))


def objective_cases(**options: Any) -> st.SearchStrategy[ObjectiveCase]:
    """`batches.objective_case`"""
    return _drawn(lambda draw: objective_case(draw, **options))


def group_ids(n: int) -> st.SearchStrategy[Integers]:
    """Ids of n responses in groups of two or more, in any order; ids need be neither sorted nor consecutive."""
    return _drawn(lambda draw: grouped(draw, n))


def _drawn(made: Callable[[Draw], T]) -> st.SearchStrategy[T]:
    return st.builds(lambda seed, index: made(Draw("", seed, index)), st.integers(0, 2**32 - 1), st.integers(0, 999))
