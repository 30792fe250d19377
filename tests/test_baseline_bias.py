"""Exact enumeration of small policies: which shifts leave GRPO's expected gradient alone (docs/baseline.md)."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks import baseline_bias
from benchmarks.baseline_bias import NORMALIZATIONS, Policy, exact

POLICIES = [Policy.random(np.random.default_rng(seed)) for seed in range(4)]


def test_a_policy_is_one() -> None:
    for policy in POLICIES:
        assert policy.probability.sum() == pytest.approx(1)
        np.testing.assert_allclose(policy.probability @ policy.score, 0, atol=1e-14)
        assert policy.length.tolist() == [1, 2, 2] + [3] * 12
        assert 0 < policy.solved < 1


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_no_bias_where_the_weighted_shift_is_constant(normalization: str, scaled: bool) -> None:
    for policy in POLICIES:
        found = exact(policy, 3, normalization, scaled=scaled, proportional=True)
        assert found.bias < 1e-12
        assert found.left_out > 1e-4
        assert found.reduction[0] > max(found.reduction[1] - 1e-12, 0)
        constant = exact(policy, 3, normalization, scaled=scaled, proportional=False)
        assert (constant.bias > 1e-4) == (normalization != "dr_grpo")


def test_plain_sums_are_the_covariance_where_nothing_is_divided() -> None:
    for policy in POLICIES:
        found = exact(policy, 3, "dr_grpo", scaled=False, proportional=False)
        assert found.plain == pytest.approx(found.best, rel=1e-9)
        divided = exact(policy, 4, "dr_grpo", scaled=True, proportional=False)
        assert divided.plain == pytest.approx(divided.best, abs=0.02)


def test_the_bias_of_dapo_falls_with_the_batch() -> None:
    for policy in POLICIES:
        two, four = (exact(policy, n, "dapo", scaled=False, proportional=False) for n in (2, 4))
        assert four.bias / abs(four.best) < 0.7 * two.bias / abs(two.best)


def test_the_command_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["baseline_bias", "--policies", "2", "--groups", "2"])
    baseline_bias.main()
    assert capsys.readouterr().out.count("| 2 |") == 10
