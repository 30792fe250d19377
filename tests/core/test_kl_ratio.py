"""kl="k3_ratio": k3 times the ratio, by hand and as an expectation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pcr_core as pcr

LOGP = np.log(np.asarray([[0.5, 0.25], [0.25, 0.5]]))
MASK = np.asarray([[True, False], [True, True]])


def _by_hand(**options: Any) -> pcr.Objective[Any]:
    """Responses of one and of two tokens at ratios of 2 and 1/2; the reference is twice as likely where it differs."""
    old, ref = LOGP - np.log([[2.0, 3.0], [0.5, 0.5]]), LOGP + np.log([[2.0, 5.0], [1.0, 2.0]])
    return pcr.grpo_objective(LOGP, old, ref, np.asarray([3.0, 1.0]), MASK, beta=0.5, kl="k3_ratio", **options)


@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.0, 0.0)])
def test_of_tokens_by_hand(clip: tuple[float, float]) -> None:
    """The ratio is not clipped, and the cotangent is beta ratio (logp - logp_ref)."""
    obj, k3 = _by_hand(clip=clip), 1 - np.log(2)
    np.testing.assert_allclose(obj.stability_loss, [0.5 * 2 * k3 / 2, 0.5 * 0.5 * k3 / 4], rtol=1e-14)
    expected = [[0.5 * 2 * -np.log(2) / 2, 0], [0, 0.5 * 0.5 * -np.log(2) / 4]]
    np.testing.assert_allclose(obj.stability_cotangent, expected, rtol=1e-14, atol=1e-17)
    assert obj.kl == pytest.approx((2 * k3 + 0.5 * k3) / 3, rel=1e-14)


def test_of_responses_by_hand() -> None:
    """A token's log-probability moves the ratio of its whole response, and so the KL of all its tokens."""
    obj, k3 = _by_hand(importance="sequence"), 1 - np.log(2)
    np.testing.assert_allclose(obj.stability_loss, [0.5 * 2 * k3 / 2, 0.5 * 0.5 * k3 / 4], rtol=1e-14)
    first = 2 * (k3 - 1) / 2  # 1 - exp(log 2) = -1
    second = 0.5 * np.asarray([k3 / 2, k3 / 2 - 1]) / 4
    np.testing.assert_allclose(obj.stability_cotangent, 0.5 * np.asarray([[first, 0], second]), rtol=1e-14, atol=1e-17)


def test_on_policy_the_losses_are_equal_and_the_derivatives_are_not() -> None:
    gap = np.asarray([[-0.5, 0.3]])
    mask, zero = np.ones((1, 2), dtype=bool), np.zeros(1)
    without, with_ratio = (
        pcr.grpo_objective(-gap, -gap, 0 * gap, zero, mask, beta=2.0, kl=k) for k in ("k3", "k3_ratio")
    )  # type: ignore[arg-type]
    np.testing.assert_array_equal(with_ratio.stability_loss, without.stability_loss)
    np.testing.assert_allclose(with_ratio.stability_cotangent, -gap, rtol=1e-15)
    np.testing.assert_allclose(without.stability_cotangent, -np.expm1(gap), rtol=1e-15)


def test_off_policy_its_gradient_is_that_of_the_kl() -> None:
    """One token of five, expectation over the old policy by summing it: grad KL(policy || reference) in the logits."""
    rng = np.random.default_rng(0)
    policy, old, ref = (x - np.log(np.exp(x).sum()) for x in rng.normal(size=(3, 5)))
    p, q = np.exp(policy), np.exp(old)
    exact = p * ((policy - ref) - (p * (policy - ref)).sum())
    columns = [x[:, None] for x in (policy, old, ref)]
    found = {}
    for kl in ("k3", "k3_ratio"):
        obj = pcr.grpo_objective(*columns, np.zeros(5), np.ones((5, 1), dtype=bool), beta=1.0, kl=kl, normalizer=1.0)  # type: ignore[arg-type]
        scores = np.eye(5) - p[None, :]  # of log softmax in the logits
        found[kl] = (q[:, None] * obj.stability_cotangent * scores).sum(0)
        value = (q * obj.stability_loss).sum()
        assert (value == pytest.approx((p * (policy - ref)).sum(), rel=1e-13)) == (kl == "k3_ratio")
    np.testing.assert_allclose(found["k3_ratio"], exact, atol=1e-15)
    assert np.abs(found["k3"] - exact).max() > 0.1
