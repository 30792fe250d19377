"""What is logged of a step, worked out by hand on three blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pcr_core import BlockStatistics, Weights
from pcr_core._summary import summary


def _weights() -> Weights[np.ndarray]:
    return Weights(
        plasticity=np.ones(3),
        stability=np.asarray([1.0, 3.0, 4.0]),
        alpha=np.asarray([0.2, 0.4, 0.9]),
        cosine=np.asarray([0.5, -0.25, -0.5]),
        conflict=np.asarray([False, True, True]),
        conflict_probability=np.asarray([0.1, 0.8, 0.9]),
        removed=np.asarray([0.0, 0.5, 0.25]),
        plasticity_nsr=np.zeros(3),
        stability_nsr=np.zeros(3),
        finite=np.asarray([True, True, False]),
    )


def _statistics() -> BlockStatistics[np.ndarray]:
    plasticity_sq, stability_sq = np.asarray([9.0, 4.0, 12.0]), np.asarray([1.0, 8.0, 7.0])
    variances = np.asarray([2.0, 3.0, 5.0]), np.asarray([1.0, 1.0, 2.0])
    dot, shared = np.asarray([1.0, -4.0, -6.0]), np.asarray([0.5, -1.0, -8.0])
    return BlockStatistics(plasticity_sq, stability_sq, dot, *variances, shared, np.ones(3))


def test_all_blocks() -> None:
    assert summary(_weights(), _statistics(), slice(None), "pcr/") == pytest.approx(
        {
            "pcr/conflict_rate": 2 / 3,
            "pcr/conflict_rate_debiased": 1 / 3,
            "pcr/noise_share": 9 / 10,
            "pcr/cosine": -0.25 / 3,
            "pcr/cosine_debiased": (0.5 / 3 - 3 / math.sqrt(32) + 2 / math.sqrt(84)) / 3,
            "pcr/alpha": 0.5,
            "pcr/boost": 5 / 3,
            "pcr/removed": math.sqrt((4 / 4 + 12 / 16) / 25),
            "pcr/plasticity_norm": 5.0,
            "pcr/stability_norm": 4.0,
            "pcr/plasticity_nsr": 10 / 25,
            "pcr/stability_nsr": 4 / 16,
            "pcr/nonfinite_blocks": 1.0,
        },
        rel=1e-15,
    )


def test_some_blocks() -> None:
    some = summary(_weights(), _statistics(), [0, 1], "")
    assert (some["conflict_rate"], some["boost"], some["nonfinite_blocks"]) == (0.5, 1.0, 0.0)
    assert some["plasticity_nsr"] == 5 / 13


def test_a_stream_of_zeros() -> None:
    """No signal and no noise is a ratio of 0; noise alone, of infinity."""
    zero = BlockStatistics(*[np.zeros(3)] * 3, np.zeros(3), np.ones(3), np.zeros(3), np.ones(3))
    values = summary(_weights(), zero, slice(None), "")
    assert (values["plasticity_nsr"], values["stability_nsr"], values["removed"]) == (0.0, math.inf, 0.0)


def test_nothing_hides_a_step_that_is_not_finite() -> None:
    nan = BlockStatistics(*[np.full(3, math.nan)] * 7)
    values = summary(_weights(), nan, slice(None), "")
    assert all(math.isnan(values[key]) for key in ("plasticity_norm", "plasticity_nsr", "stability_nsr", "removed"))
