"""Depth on NumPy: many cases of every rule against exact arithmetic, stage by stage and from end to end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pcr_core as pcr
from pcr_conformance import laws, oracle
from pcr_conformance.cases import Case
from pcr_conformance.laws.checks import as_seen, near
from pcr_conformance.libraries import library
from pcr_conformance.rounding import Arithmetic
from pcr_conformance.strategies import cases
from pcr_conformance.tolerances import update_bounds

NUMPY = library("numpy")
FLOAT64 = Arithmetic("float64")
RULES = {
    "default": pcr.PCR(alpha="variance"),
    "paper": pcr.PCR.paper(),
    "literal": pcr.PCR.paper(update="literal"),
    "snr": pcr.PCR(alpha="snr", max_boost=3.0),
    "number": pcr.PCR(alpha=0.7),
    "shrinkage": pcr.PCR(alpha="variance", prior=pcr.ShrinkagePrior()),
    "debiased": pcr.PCR(alpha="variance", conflict="debiased"),
    "shrinkage debiased snr": pcr.PCR(alpha="snr", prior=pcr.ShrinkagePrior(), conflict="debiased"),
    "probability": pcr.PCR(alpha="variance", gate="probability"),
    "probability debiased literal": pcr.PCR(
        alpha="variance", gate="probability", conflict="debiased", update="literal"
    ),
    "grpo": pcr.GRPO(),
    "no anchor": pcr.NoAnchor(),
    "hard": pcr.HardProjection(),
    "fixed": pcr.FixedAlpha(0.3),
    "pcgrad": pcr.PCGrad(),
    "mgda": pcr.MGDA(),
}


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=40)
@given(case=cases(), dtype=st.sampled_from(["float64", "float32"]))
def test_weights_and_update(name: str, case: Case, dtype: str) -> None:
    laws.what_is_resolved_is_reported(NUMPY, case, dtype, RULES[name])
    if dtype == "float64":
        laws.update_is_the_combination(NUMPY, case, dtype, RULES[name])


@settings(max_examples=100)
@given(case=cases(), strata=st.sampled_from(["group", "batch"]), separate=st.booleans())
def test_statistics(case: Case, strata: str, separate: bool) -> None:
    """Both kinds of strata, and a stability stream of other responses than the plasticity stream's."""
    if separate:
        slots = np.concatenate([np.arange(len(case.group_ids)), [0, 1]])
        ids = np.concatenate([case.group_ids, [77, 77]])
        case = case.with_(stability=case.stability[slots], stability_group_ids=ids)
    laws.statistics_are_exact(NUMPY, case.with_(strata=strata), "float64")


@pytest.mark.parametrize("name", ["default", "paper", "literal", "snr", "hard"])
@settings(max_examples=25)
@given(case=cases())
def test_from_end_to_end(name: str, case: Case) -> None:
    """The update against the exact one, with an allowance for what the case itself amplifies."""
    case = as_seen(NUMPY, case, "float64")
    exact, _, _ = oracle.resolve(case, RULES[name])
    got = NUMPY.resolve(case, RULES[name], "float64").update
    allowed = update_bounds(case, RULES[name], FLOAT64, "float64")
    for i, block in enumerate(case.blocks()):
        near(f"{name}, block {i}", "update", got[block], [float(x) for x in exact[block]], allowed[i])


def test_the_bounds_bind() -> None:
    """On an ordinary case the allowance is a matter of rounding: the check above is not vacuous."""
    rng = np.random.default_rng(0)
    p, s = rng.normal(size=(2, 8, 16))
    case = Case(p, s - 2 * p, np.repeat([0, 1], 4), (16,))
    assert case.plasticity.sum(0) @ case.stability.sum(0) < 0
    assert max(update_bounds(case, pcr.PCR(alpha="variance"), FLOAT64, "float64")) < 1e-11 * np.linalg.norm(p.sum(0))


def test_oracle_by_hand() -> None:
    """The reference itself on numbers worked out on paper."""
    case = Case(np.asarray([[1.0, 0.0], [3.0, 2.0]]), np.asarray([[-1.0, 0.0], [0.0, 1.0]]), np.asarray([4, 4]), (2,))
    (stats,) = oracle.statistics(case)
    # P = (4, 2), S = (-1, 1); v = 2 (sum of squares - |total|^2/2)
    assert (stats.p2, stats.s2, stats.c) == (20, 2, -2)
    assert (stats.vp, stats.vs, stats.vps) == (2 * (14 - 10), 2 * (2 - 1), 2 * (1 + 1))
    pair = oracle.weights(pcr.PCR(alpha="variance"), stats)
    assert (pair.alpha, pair.b) == (oracle.Fraction(4, 5), 1 + oracle.Fraction(4, 5))
    assert oracle.shrinkage_gain(stats.p2, stats.vp) == oracle.Fraction(12, 20)


@settings(max_examples=60)
@given(case=cases(largest_exponent=3), discount=st.sampled_from([0.5, 0.9, 1.0]), louder=st.sampled_from([0.25, 1, 8]))
def test_temporal_prior(case: Case, discount: float, louder: float) -> None:
    """Three steps of the Kalman filter: means and variances follow the exact recursion."""
    rule = pcr.PCR(alpha="variance", prior=pcr.TemporalPrior(discount))
    steps = [case, case.with_(plasticity=case.plasticity[::-1] * louder), case.with_(stability=-case.stability)]
    state, memory = None, {}
    for step in steps:
        res = pcr.resolve(
            step.plasticity, step.stability, group_ids=step.group_ids, sizes=step.sizes, rule=rule, state=state
        )
        state = res.state
        assert state is not None
        for stream in ("plasticity", "stability"):
            total = oracle.total([oracle.exact(row) for row in getattr(step, stream)])
            size = 1e-300 + np.abs(np.concatenate([getattr(s, stream) for s in steps])).sum()
            for i, block in enumerate(step.blocks()):
                # the library's own v: whether it is 0 or 1e-40 decides the gain
                v = oracle.Fraction(float(getattr(res.statistics, f"{stream}_var")[i]))
                mean, var = memory.get((stream, i), (None, None))
                mean, var = oracle.temporal_step(total[block], v, mean, var, discount)
                memory[stream, i] = mean, var
                got = getattr(state, f"{stream}_mean")[block]
                np.testing.assert_allclose(got, [float(x) for x in mean], rtol=1e-9, atol=1e-13 * size)
                np.testing.assert_allclose(getattr(state, f"{stream}_var")[i], float(var), rtol=1e-9, atol=0)
        for i, block in enumerate(step.blocks()):
            a, b = res.weights.plasticity[i], res.weights.stability[i]
            expected = a * state.plasticity_mean[block] + b * state.stability_mean[block]
            np.testing.assert_allclose(res.update[block], expected, rtol=1e-14)
            assert a == 1
            c = state.plasticity_mean[block] @ state.stability_mean[block]
            s2 = state.stability_mean[block] @ state.stability_mean[block]
            boost = min(res.weights.alpha[i] * max(-c, 0) / s2, 10.0) if s2 > 0 else 0.0
            np.testing.assert_allclose(b, 1 + boost, rtol=1e-9, atol=1e-12)
