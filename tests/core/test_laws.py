"""Every law on every library that is installed. What adds time and little else is marked slow."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pcr_core as pcr
from pcr_conformance import laws
from pcr_conformance.adapter import Adapter, largest_exponent
from pcr_conformance.cases import Case
from pcr_conformance.libraries import NAMES, library, missing
from pcr_conformance.strategies import REGIMES, SHAPES, cases, objective_cases

CONFLICT = ("conflict", "antiparallel", "free", "one huge response", "nearly identical responses")
NO_CONFLICT = ("no conflict", "orthogonal", "parallel", "zero plasticity", "zero stability", "both zero", "free")

PROJECTIONS = (pcr.PCR(), pcr.PCR.paper(), pcr.PCR(alpha="snr"), pcr.PCR.paper(update="literal"))
SHRINKING = pcr.PCR(prior=pcr.ShrinkagePrior(), conflict="debiased")
PROBABLE = pcr.PCR(gate="probability")
OTHERS = (pcr.GRPO(), pcr.NoAnchor(), pcr.HardProjection(), pcr.FixedAlpha(0.3), pcr.PCGrad(), pcr.MGDA())
seeds = st.integers(0, 2**32 - 1)


EAGER = tuple(name for name in NAMES if "jit" not in name and "compile" not in name)
COMPILED = tuple(name for name in NAMES if name not in EAGER)


def _named(name: str) -> Adapter:
    reason = missing(name)
    if reason:
        pytest.skip(reason)
    return library(name)


def _slow(names: tuple[str, ...], quick: tuple[str, ...]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(params=EAGER)
def eager(request: pytest.FixtureRequest) -> Adapter:
    """Laws on numbers run on every library."""
    return _named(request.param)


@pytest.fixture(params=_slow(EAGER, ("numpy", "torch", "jax-x32")))
def shaped(request: pytest.FixtureRequest) -> Adapter:
    """Laws on structure: what float64 NumPy, torch and float32 JAX obey, the other two are unlikely to break alone."""
    return _named(request.param)


@pytest.fixture(params=_slow(COMPILED, ("torch-compile-aot", "jax-jit", "jax-x32-jit")))
def compiled(request: pytest.FixtureRequest) -> Adapter:
    return _named(request.param)


@pytest.fixture(params=_slow(NAMES, (*EAGER, "jax-jit", "jax-x32-jit")))
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return _named(request.param)


def _draw(data: st.DataObject, adapter: Adapter, dtype: str, **options: object) -> Case:
    # JAX compiles every operation for each new shape, eager or not
    options.setdefault("shapes", SHAPES[1:2] if adapter.compiled else SHAPES[:2] if "jax" in adapter.name else SHAPES)
    if dtype == "float16":  # one huge response is beyond its range
        options["regimes"] = tuple(r for r in options.get("regimes", REGIMES) if "huge" not in r)  # type: ignore[attr-defined]
    return data.draw(cases(largest_exponent=largest_exponent(adapter, dtype), **options))  # type: ignore[arg-type]


@given(data=st.data())
def test_statistics_are_exact(eager: Adapter, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(eager.dtypes))
    laws.statistics_are_exact(eager, _draw(data, eager, dtype), dtype)


@given(data=st.data())
def test_weights_are_exact(eager: Adapter, data: st.DataObject) -> None:
    rule = data.draw(st.sampled_from((*PROJECTIONS, PROBABLE, SHRINKING, *OTHERS)))
    laws.weights_are_exact(eager, _draw(data, eager, "float32"), "float32", rule)


@given(data=st.data())
def test_update_is_the_combination(eager: Adapter, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(eager.dtypes))
    rule = data.draw(st.sampled_from((*PROJECTIONS, SHRINKING, *OTHERS)))
    if dtype in ("float32", "float16") and rule in (pcr.PCR.paper(), pcr.HardProjection(), pcr.FixedAlpha(0.3)):
        rule = pcr.PCR()  # an unbounded b S may be beyond what the output dtype can hold
    laws.update_is_the_combination(eager, _draw(data, eager, dtype), dtype, rule)


@given(data=st.data())
def test_no_conflict_is_the_plain_sum(eager: Adapter, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(eager.dtypes[:2]))
    rule = data.draw(st.sampled_from((*PROJECTIONS, PROBABLE, pcr.HardProjection(), pcr.PCGrad())))
    laws.no_conflict_is_the_plain_sum(eager, _draw(data, eager, dtype, regimes=NO_CONFLICT), dtype, rule)


@pytest.mark.parametrize("kind", ["variance", "snr"])
@given(data=st.data())
def test_alpha_is_a_fraction(shaped: Adapter, kind: str, data: st.DataObject) -> None:
    laws.alpha_is_a_fraction(shaped, _draw(data, shaped, "float32"), "float32", kind)


@given(data=st.data(), kind=st.sampled_from(["variance", "snr", 0.25, 1.0]))
def test_conflict_keeps_its_fraction(shaped: Adapter, data: st.DataObject, kind: str) -> None:
    laws.conflict_keeps_its_fraction(shaped, _draw(data, shaped, "float32", regimes=CONFLICT), "float32", kind)


@given(data=st.data(), kind=st.sampled_from(["variance", "snr", 1.0]))
def test_projection_never_lengthens(shaped: Adapter, data: st.DataObject, kind: str) -> None:
    laws.projection_never_lengthens(shaped, _draw(data, shaped, "float32"), "float32", kind)


@given(data=st.data(), max_boost=st.sampled_from([0.0, 0.5, 10.0]))
def test_boost_is_capped(shaped: Adapter, data: st.DataObject, max_boost: float) -> None:
    laws.boost_is_capped(shaped, _draw(data, shaped, "float32"), "float32", max_boost)


@given(data=st.data(), seed=seeds)
def test_rotation_goes_through(shaped: Adapter, data: st.DataObject, seed: int) -> None:
    rule = data.draw(st.sampled_from(PROJECTIONS))
    dtype = shaped.dtypes[0]
    laws.rotation_goes_through(shaped, _draw(data, shaped, dtype), dtype, rule, seed)


@given(data=st.data(), seed=seeds)
def test_order_does_not_matter(shaped: Adapter, data: st.DataObject, seed: int) -> None:
    rule = data.draw(st.sampled_from(PROJECTIONS))
    dtype = shaped.dtypes[0]
    laws.order_does_not_matter(shaped, _draw(data, shaped, dtype), dtype, rule, seed)


@given(data=st.data(), power=st.sampled_from([-5, 1, 4]))
def test_scale_goes_through(shaped: Adapter, data: st.DataObject, power: int) -> None:
    rule = data.draw(st.sampled_from((*PROJECTIONS, PROBABLE)))
    dtype = shaped.dtypes[0]
    laws.scale_goes_through(shaped, _draw(data, shaped, dtype), dtype, rule, power)


@settings(max_examples=10)
@given(data=st.data(), seed=seeds)
def test_strata_add_up(shaped: Adapter, data: st.DataObject, seed: int) -> None:
    laws.strata_add_up(shaped, _draw(data, shaped, "float32", shapes=SHAPES[1:2]), "float32", seed)


@settings(max_examples=10)
@given(data=st.data(), seed=seeds)
def test_shards_add_up(shaped: Adapter, data: st.DataObject, seed: int) -> None:
    laws.shards_add_up(shaped, _draw(data, shaped, "float32", shapes=SHAPES[:2]), "float32", seed)


@settings(max_examples=12)
@given(data=st.data())
def test_compiled_equals_eager(compiled: Adapter, data: st.DataObject) -> None:
    dtype = "float32"
    rules = (pcr.PCR(prior=pcr.ShrinkagePrior(), gate="probability"), pcr.PCR())
    rule = data.draw(st.sampled_from(rules[:1] if "torch" in compiled.name else rules))
    laws.compiled_equals_eager(compiled, _draw(data, compiled, dtype), dtype, rule)


@settings(max_examples=1)
@given(data=st.data())
def test_dtype_and_device_come_back(eager: Adapter, data: st.DataObject) -> None:
    case = data.draw(cases(shapes=SHAPES[1:2], largest_exponent=0, regimes=("free",)))
    laws.dtype_and_device_come_back(eager, case, pcr.PCR())


@settings(max_examples=10)
@given(data=st.data(), bad=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_non_finite_is_never_hidden(adapter: Adapter, data: st.DataObject, bad: float) -> None:
    dtype = "float32"
    rules = (pcr.PCR(),) if adapter.compiled else (*PROJECTIONS, PROBABLE, SHRINKING, *OTHERS)
    rule = data.draw(st.sampled_from(rules))
    shapes = SHAPES[3:4] if adapter.name == "numpy" else SHAPES[1:2]
    case = data.draw(cases(shapes=shapes, largest_exponent=min(6, largest_exponent(adapter, dtype))))
    stream = data.draw(st.sampled_from(["plasticity", "stability"]))
    response = data.draw(st.integers(0, len(case.group_ids) - 1))
    coordinate = data.draw(st.integers(0, sum(case.sizes) - 1))
    laws.non_finite_is_never_hidden(adapter, case, dtype, rule, bad, stream, response, coordinate)


@settings(max_examples=5)
@given(data=st.data())
def test_overflow_is_flagged(eager: Adapter, data: st.DataObject) -> None:
    case = data.draw(cases(shapes=SHAPES[:1], regimes=("free", "conflict"), largest_exponent=2))
    laws.overflow_is_flagged(eager, case, eager.dtypes[0], data.draw(st.sampled_from((*PROJECTIONS, pcr.MGDA()))))


@given(data=st.data())
def test_objective_is_exact(eager: Adapter, data: st.DataObject) -> None:
    case = data.draw(objective_cases(shapes=((4, 3),)))
    dtype = data.draw(st.sampled_from(eager.dtypes))
    laws.objective_is_exact(eager, case, dtype)


@pytest.mark.parametrize("name", _slow(("torch", "jax", "jax-x32"), ("torch", "jax")))
@given(data=st.data())
def test_cotangents_equal_autodiff(name: str, data: st.DataObject) -> None:
    adapter = _named(name)
    case = data.draw(objective_cases(shapes=((4, 3),)))
    laws.cotangents_equal_autodiff(adapter, case, adapter.dtypes[0])


@settings(max_examples=8)
@given(data=st.data())
def test_masked_entries_have_no_say(eager: Adapter, data: st.DataObject) -> None:
    laws.masked_entries_have_no_say(eager, data.draw(objective_cases()), data.draw(st.sampled_from(eager.dtypes)))
