"""The objective where laws do not reach: by hand, accumulation, advantages, clip direction, half precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pcr_core as pcr
from pcr_conformance import laws, oracle_objective
from pcr_conformance.adapter import Adapter
from pcr_conformance.libraries import library, missing
from pcr_conformance.strategies import group_ids, objective_cases

NUMPY = library("numpy")
NORMALIZATIONS = ("grpo", "dapo", "bnpo", "dr_grpo")


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@settings(max_examples=15)
@given(data=st.data(), dtype=st.sampled_from(["float64", "float32", "float16"]))
def test_against_differences_in_100_digits(
    normalization: str, importance: str, data: st.DataObject, dtype: str
) -> None:
    case = data.draw(objective_cases(dtype=dtype, normalization=normalization, importance=importance))
    laws.objective_is_exact(NUMPY, case, dtype)


def _call(ratio: float, advantage: float, clip: tuple[float, float] = (0.2, 0.3)) -> pcr.Objective:  # type: ignore[type-arg]
    logp = np.asarray([[np.log(ratio)]])
    zero = np.zeros((1, 1))
    return pcr.grpo_objective(
        logp, zero, logp, np.asarray([advantage]), np.ones((1, 1), dtype=bool), beta=0.1, clip=clip
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "cotangent"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.29, 2.0, -2.58, -2.58),  # inside: the gradient passes
        (1.5, 2.0, -2.6, 0.0),  # a good response is likely enough
        (0.5, 2.0, -1.0, -1.0),  # a good response that became unlikely is pulled back
        (0.81, -2.0, 1.62, 1.62),
        (0.5, -2.0, 1.6, 0.0),  # a bad response is unlikely enough
        (1.5, -2.0, 3.0, 3.0),  # a bad response that became likely is pushed down, clip or not
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clip_by_hand(ratio: float, advantage: float, loss: float, cotangent: float) -> None:
    obj = _call(ratio, advantage)
    assert float(obj.plasticity_loss[0]) == pytest.approx(loss)
    assert float(obj.plasticity_cotangent[0, 0]) == pytest.approx(cotangent)
    assert float(obj.clip_fraction) == float(cotangent == 0 and advantage != 0)


def test_clip_by_default() -> None:
    ratios = np.asarray([[0.79], [0.81], [1.19], [1.21]])
    zero, advantages = np.zeros((4, 1)), np.asarray([-1.0, -1.0, 1.0, 1.0])
    obj = pcr.grpo_objective(np.log(ratios), zero, zero, advantages, np.ones((4, 1)), beta=0.0)
    np.testing.assert_allclose(obj.plasticity_cotangent[:, 0], [0, 0.81 / 4, -1.19 / 4, 0], rtol=1e-14)
    np.testing.assert_allclose(obj.plasticity_loss, [0.8 / 4, 0.81 / 4, -1.19 / 4, -1.2 / 4], rtol=1e-14)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_at_the_bound_the_gradient_passes(advantage: float) -> None:
    """On-policy every ratio is 1; without any room around it, the step is still the policy gradient's."""
    obj = _call(1.0, advantage, clip=(0.0, 0.0))
    assert (float(obj.plasticity_cotangent[0, 0]), float(obj.clip_fraction)) == (-advantage, 0)


def test_reference_pulls_back() -> None:
    """Where the policy is more likely than the reference, descent on the KL lowers logp; the loss is never negative."""
    gap = np.asarray([[-0.5, 0.0, 0.5, 1e-9]])
    obj = pcr.grpo_objective(-gap, -gap, 0 * gap, np.zeros(1), np.ones((1, 4), dtype=bool), beta=2.0)
    np.testing.assert_allclose(obj.stability_cotangent, 2 * -np.expm1(gap) / 4, rtol=1e-15)
    assert (obj.stability_loss >= 0).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("importance", ["token", "sequence"])
@settings(max_examples=15)
@given(data=st.data())
def test_micro_batches_add_up_to_the_batch(normalization: str, importance: str, data: st.DataObject) -> None:
    """With the whole batch's normalizer, the parts' losses and cotangents are the batch's, row by row."""
    case = data.draw(objective_cases(normalization=normalization, importance=importance))
    case = replace(case, normalizer=None)
    n, length = case.logp.shape
    whole = {"grpo": n, "dr_grpo": n * length}.get(normalization, max(int(case.mask.sum()), 1))
    full = NUMPY.objective(case, "float64")
    for rows in (slice(0, 2), slice(2, n)):
        part = replace(
            case,
            logp=case.logp[rows],
            logp_old=case.logp_old[rows],
            logp_ref=case.logp_ref[rows],
            advantages=case.advantages[rows],
            mask=case.mask[rows],
            normalizer=float(whole),
        )
        got = NUMPY.objective(part, "float64")
        for name in ("plasticity_loss", "stability_loss", "plasticity_cotangent", "stability_cotangent"):
            np.testing.assert_allclose(getattr(got, name), getattr(full, name)[rows], rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["torch", "jax", "numpy"])
def test_dtypes(name: str, dtype: str) -> None:
    """Cotangents come back in logp's dtype, losses in float32 or wider."""
    if missing(name):
        pytest.skip(str(missing(name)))
    adapter: Adapter = library(name)
    if dtype not in adapter.dtypes:
        pytest.skip(f"{name} has no {dtype}")
    with adapter.scope():  # type: ignore[attr-defined]
        x = adapter.from_numpy(np.full((2, 3), -0.5), dtype)
        advantages = adapter.from_numpy(np.asarray([1.0, -1.0]), "float32")
        obj = pcr.grpo_objective(x, x, x, advantages, adapter.from_numpy(np.ones((2, 3)), "bool"), beta=0.1)
        assert obj.plasticity_cotangent.dtype == x.dtype
        assert obj.stability_cotangent.dtype == x.dtype
        assert str(obj.plasticity_loss.dtype).endswith("float64" if dtype == "float64" else "float32")


def test_mask_of_numbers_is_a_mask() -> None:
    case = _mask_case()
    a = pcr.grpo_objective(*case, np.asarray([[True, False], [True, True]]), beta=0.1)
    b = pcr.grpo_objective(*case, np.asarray([[1, 0], [1, 1]]), beta=0.1)
    np.testing.assert_array_equal(a.plasticity_cotangent, b.plasticity_cotangent)


def test_nothing_to_learn_from() -> None:
    """All tokens masked: zeros, not NaN."""
    for normalization in NORMALIZATIONS:
        obj = pcr.grpo_objective(*_mask_case(), np.zeros((2, 2), dtype=bool), beta=0.1, normalization=normalization)  # type: ignore[call-overload]
        for name in ("plasticity_loss", "stability_loss", "plasticity_cotangent", "kl", "clip_fraction"):
            assert (getattr(obj, name) == 0).all()


def _mask_case():  # type: ignore[no-untyped-def]
    x = -np.asarray([[0.1, 0.2], [0.3, 0.4]])
    return x, x - 0.1, x + 0.2, np.asarray([1.0, -1.0])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("name", ["numpy", "array-api-strict", "torch", "jax"])
@given(data=st.data())
def test_advantages(name: str, scale: str, data: st.DataObject) -> None:
    if missing(name):
        pytest.skip(str(missing(name)))
    adapter: Adapter = library(name)
    ids = data.draw(group_ids(7))
    rewards = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).normal(size=7)
    with adapter.scope():  # type: ignore[attr-defined]
        got = pcr.group_advantages(adapter.from_numpy(rewards, "float64"), adapter.from_numpy(ids, "int"), scale=scale)  # type: ignore[arg-type]
        expected = oracle_objective.advantages(rewards, ids, scale, 1e-4)
        np.testing.assert_allclose(adapter.to_numpy(got), expected, rtol=1e-12, atol=1e-14)


def test_advantages_by_hand() -> None:
    """Less the group's mean, over the deviation (Bessel-corrected) of the group or of the batch, plus 1e-4."""
    rewards, ids = np.asarray([1.0, 0.0, 5.0, 3.0]), np.asarray([0, 0, 1, 1])
    centred = np.asarray([0.5, -0.5, 1.0, -1.0])
    by_group = np.asarray([0.5, 0.5, 2.0, 2.0]) ** 0.5 + 1e-4
    np.testing.assert_allclose(pcr.group_advantages(rewards, ids), centred / by_group, rtol=1e-15)
    by_batch = (14.75 / 3) ** 0.5 + 1e-4
    np.testing.assert_allclose(pcr.group_advantages(rewards, ids, scale="batch"), centred / by_batch, rtol=1e-15)
    loose = pcr.group_advantages(rewards, ids, scale="batch", eps=1.0)
    np.testing.assert_allclose(loose, centred / ((14.75 / 3) ** 0.5 + 1), rtol=1e-15)
    # alone in a group is no matter where the group's deviation is not asked for, nor are two responses too few
    assert (pcr.group_advantages(rewards, np.arange(4), scale="batch") == 0).all()
    two = pcr.group_advantages(rewards[:2], ids[:2], scale="batch", eps=0.0)
    np.testing.assert_allclose(two, [0.5**0.5, -(0.5**0.5)], rtol=1e-15)


def test_half_precision_advantages_are_computed_in_float32() -> None:
    rewards = np.asarray([1.0, 0.0], dtype=np.float16)
    advantages = pcr.group_advantages(rewards, np.asarray([0, 0]))
    assert advantages.dtype == np.float16
    assert advantages[0] == np.float16(0.5 / (0.5**0.5 + 1e-4))


def _by_hand(**options: Any) -> pcr.Objective:  # type: ignore[type-arg]
    """Responses of one and of two tokens at ratios of 2 and 1/2; the reference is twice as likely where it differs."""
    logp = np.log(np.asarray([[0.5, 0.25], [0.25, 0.5]]))
    old = logp - np.log([[2.0, 3.0], [0.5, 0.5]])
    ref = logp + np.log([[2.0, 5.0], [1.0, 2.0]])
    mask = np.asarray([[1.0, 0.0], [1.0, 1.0]])
    return pcr.grpo_objective(logp, old, ref, np.asarray([3.0, 1.0]), mask, beta=0.5, **options)


@pytest.mark.parametrize(
    ("options", "first", "second"),  # weights of a token of either response
    [
        ({}, 1 / 2, 1 / 4),
        ({"normalization": "dapo"}, 1 / 3, 1 / 3),
        ({"normalization": "bnpo"}, 1 / 3, 1 / 3),
        ({"normalization": "dr_grpo"}, 1 / 4, 1 / 4),
        ({"normalizer": 4.0}, 1 / 4, 1 / 8),
    ],
)
def test_objective_by_hand(options: dict[str, Any], first: float, second: float) -> None:
    obj = _by_hand(**options)
    k3 = 1 - np.log(2)  # exp(l) - 1 - l at l = log 2
    np.testing.assert_allclose(obj.plasticity_loss, [-3 * 1.2 * first, -second], rtol=1e-14)
    np.testing.assert_allclose(obj.stability_loss, [0.5 * k3 * first, 0.5 * k3 * second], rtol=1e-14)
    np.testing.assert_allclose(obj.plasticity_cotangent, [[0, 0], [-second / 2, -second / 2]], rtol=1e-14)
    np.testing.assert_allclose(obj.stability_cotangent, [[-first / 2, 0], [0, -second / 2]], rtol=1e-14)
    assert obj.kl == pytest.approx(2 * k3 / 3, rel=1e-14)
    assert obj.clip_fraction == pytest.approx(1 / 3, rel=1e-14)


def test_ratios_of_responses_by_hand() -> None:
    obj = _by_hand(importance="sequence", clip=(0.4, 0.3))
    np.testing.assert_allclose(obj.plasticity_loss, [-3 * 1.3 / 2, -0.5 / 2], rtol=1e-14)
    np.testing.assert_allclose(obj.plasticity_cotangent, [[0, 0], [-1 / 8, -1 / 8]], rtol=1e-14)
    assert obj.clip_fraction == 1 / 2


def test_equal_rewards_teach_nothing() -> None:
    assert (pcr.group_advantages(np.full(4, 0.25), np.asarray([0, 0, 1, 1])) == 0).all()


def test_a_nan_reward_stays_in_its_group() -> None:
    rewards = np.asarray([1.0, np.nan, 0.0, 1.0])
    advantages = pcr.group_advantages(rewards, np.asarray([0, 0, 1, 1]))
    assert np.isnan(advantages[:2]).all()
    assert np.isfinite(advantages[2:]).all()
