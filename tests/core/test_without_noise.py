"""Statistics without noise: rules that need none decide as ever, the others say what they miss."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

import pcr_core
from pcr_core import (
    GRPO,
    MGDA,
    PCR,
    BlockStatistics,
    FixedAlpha,
    HardProjection,
    NoAnchor,
    PCGrad,
    ShrinkagePrior,
    TemporalPrior,
    merge,
    needs_noise,
)
from pcr_core._summary import summary

WITHOUT = (PCR(), PCR(alpha=0.0, max_boost=math.inf, update="literal"), GRPO(), NoAnchor(), HardProjection(),
           FixedAlpha(0.3), PCGrad(), MGDA())  # fmt: skip
WITH = (PCR(alpha="variance"), PCR(alpha="snr"), PCR(gate="probability"), PCR(conflict="debiased"),
        PCR(prior=ShrinkagePrior()), PCR(prior=TemporalPrior()), PCR.paper())  # fmt: skip
NOISE = ("plasticity_var", "stability_var", "covariance")
OF_NOISE = {"conflict_probability", "plasticity_nsr", "stability_nsr"}


def statistics() -> BlockStatistics[Any]:
    return BlockStatistics(*np.random.default_rng(0).uniform(0.5, 2.0, (7, 4)) * [1, 1, 0.3, 1])


def blind(stats: BlockStatistics[Any]) -> BlockStatistics[Any]:
    return replace(stats, plasticity_var=None, stability_var=None, covariance=None)


def opposed() -> BlockStatistics[Any]:
    stats = statistics()
    return replace(stats, dot=-0.3 * stats.dot * [1, -1, 1, 0])


@pytest.mark.parametrize("rule", WITHOUT, ids=repr)
def test_rules_that_need_none_decide_alike_and_report_none(rule: Any) -> None:
    assert not needs_noise(rule)
    with_noise, without = rule(opposed()), rule(blind(opposed()))
    for field in fields(with_noise):
        if field.name in OF_NOISE:
            assert getattr(without, field.name) is None
        else:
            np.testing.assert_array_equal(getattr(without, field.name), getattr(with_noise, field.name))


@pytest.mark.parametrize("rule", WITH, ids=repr)
def test_rules_that_need_it_say_so(rule: Any) -> None:
    assert needs_noise(rule)
    with pytest.raises(ValueError, match=r"needs the gradients' noise, which was not measured"):
        rule.posteriors(blind(opposed()), (1.0, 1.0)) if isinstance(rule.prior, TemporalPrior) else rule(
            blind(opposed())
        )


def test_a_rule_that_does_not_say_is_taken_to_need_it() -> None:
    assert needs_noise(lambda stats: GRPO()(stats))


def test_noise_is_measured_in_all_of_its_numbers_or_in_none() -> None:
    with pytest.raises(ValueError, match=r"covariance is None and others"):
        GRPO()(replace(statistics(), covariance=None))
    merged = merge(blind(statistics()), blind(statistics()))
    assert merged.covariance is None
    np.testing.assert_array_equal(merged.dot, 2 * statistics().dot)
    with pytest.raises(ValueError, match="measured in some of these and not in others"):
        merge(statistics(), blind(statistics()))


def test_nonfinite_totals_are_seen_without_noise() -> None:
    broken = replace(blind(statistics()), dot=np.asarray([1.0, np.nan, 1.0, 1.0]))
    weights = pcr_core.PCR()(broken)
    assert weights.finite.tolist() == [True, False, True, True]
    assert np.isnan(weights.stability).tolist() == [False, True, False, False]


def test_a_summary_leaves_out_what_was_not_measured() -> None:
    whole, part = (summary(PCR()(s), s, slice(None), "") for s in (opposed(), blind(opposed())))
    assert whole.keys() - part.keys() == {
        "conflict_rate_debiased", "noise_share", "cosine_debiased", "plasticity_nsr", "stability_nsr",
    }  # fmt: skip
    assert part.items() <= whole.items()
