"""What cannot be meant is refused: the error names the argument, what came and what is expected."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import pcr_core as pcr

P = np.asarray([[1.0, 2.0], [3.0, 1.0], [0.5, 0.0]])
IDS = np.asarray([0, 0, 0])
LOGP = -np.ones((2, 3))
GOOD: dict[str, Any] = {
    "logp": LOGP,
    "logp_old": LOGP,
    "logp_ref": LOGP,
    "advantages": np.ones(2),
    "mask": np.ones((2, 3), dtype=bool),
    "beta": 0.1,
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"stability": P[:2]}, ValueError, r"stability: expected shape \(3, 2\).*got \(2, 2\)"),
        ({"stability": P[:, :1]}, ValueError, r"stability: expected shape \(3, 2\).*got \(3, 1\)"),
        ({"plasticity": P[0]}, ValueError, r"plasticity: expected shape \(any, any\).*got \(2,\)"),
        ({"group_ids": IDS[:2]}, ValueError, r"group_ids: expected shape \(3,\).*got \(2,\)"),
        ({"group_ids": IDS[:, None]}, ValueError, r"group_ids: expected shape \(3,\)"),
        ({"group_ids": IDS.astype(float)}, TypeError, "group_ids: expected integers, got float64"),
        ({"group_ids": IDS == 0}, TypeError, "group_ids: expected integers, got bool"),
        ({"group_ids": np.asarray([0, 0, 1])}, ValueError, "group_ids: a stratum of one response"),
        ({"stability_group_ids": np.asarray([0, 0, 1])}, ValueError, "stability_group_ids: a stratum of one"),
        ({"stability_group_ids": IDS[:2]}, ValueError, r"stability_group_ids: expected shape \(3,\)"),
        ({"plasticity": P.astype(int)}, TypeError, "plasticity: expected a real floating dtype, got int64"),
        ({"stability": P.astype(complex)}, TypeError, "stability: expected a real floating dtype, got complex128"),
        ({"plasticity": P.tolist()}, TypeError, "plasticity: expected an array .* got builtins.list"),
        ({"sizes": (1, 2)}, ValueError, r"sizes: expected positive numbers that add up to 2, got \(1, 2\)"),
        ({"sizes": (1,)}, ValueError, r"sizes: expected positive numbers that add up to 2, got \(1,\)"),
        ({"sizes": (0, 2)}, ValueError, "sizes: expected positive"),
        ({"sizes": ()}, ValueError, r"sizes: .* add up to 2, got \(\)"),
        ({"sizes": (1.0, 1.0)}, ValueError, "sizes: expected positive"),
        ({"sizes": (True, True)}, ValueError, "sizes: expected positive"),
        ({"sizes": (3, -1)}, ValueError, "sizes: expected positive"),
        ({"strata": "prompt"}, ValueError, r"strata: expected one of \('group', 'batch'\), got 'prompt'"),
    ],
)
def test_resolve(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pcr.resolve(**{"plasticity": P, "stability": P, "group_ids": IDS, **changes})


def test_batch_strata_allow_single_responses() -> None:
    res = pcr.resolve(P, -P, group_ids=np.asarray([0, 1, 2]), strata="batch")
    assert np.isfinite(res.update).all()
    assert pcr.resolve(P[:2], -P[:2], group_ids=IDS[:2], strata="batch").weights.finite
    with pytest.raises(ValueError, match="group_ids: one response"):
        pcr.resolve(P[:1], -P[:1], group_ids=IDS[:1], strata="batch")


def test_state_without_a_filter() -> None:
    rule = pcr.PCR(alpha="variance", prior=pcr.TemporalPrior())
    state = pcr.resolve(P, -P, group_ids=IDS, rule=rule).state
    with pytest.raises(ValueError, match="state: only PCR with TemporalPrior"):
        pcr.resolve(P, -P, group_ids=IDS, state=state)


def test_state_of_another_model() -> None:
    rule = pcr.PCR(alpha="variance", prior=pcr.TemporalPrior())
    state = pcr.resolve(P, -P, group_ids=IDS, rule=rule).state
    assert state is not None
    with pytest.raises(ValueError, match=r"state: expected shape \(1,\).*got \(2,\)"):
        pcr.resolve(P[:, :1], -P[:, :1], group_ids=IDS, rule=rule, state=state)
    whole = replace(state, plasticity_mean=np.asarray([1, 2]))
    with pytest.raises(TypeError, match="state: expected a real floating dtype, got int64"):
        pcr.resolve(P, -P, group_ids=IDS, rule=rule, state=whole)


def test_mixed_libraries() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"one library.*plasticity is torch.*stability is numpy"):
        pcr.resolve(torch.asarray(P), P, group_ids=torch.asarray(IDS))  # type: ignore[misc]
    with pytest.raises(TypeError, match="one library"):
        pcr.grpo_objective(**{**GOOD, "logp_ref": torch.asarray(LOGP)})
    with pytest.raises(TypeError, match=r"normalizer: .* library, got torch"):
        pcr.grpo_objective(**{**GOOD, "normalizer": torch.tensor(4.0)})


def test_mixed_devices() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"one device.*stability on meta"):
        pcr.resolve(torch.asarray(P), torch.empty((3, 2), device="meta"), group_ids=torch.asarray(IDS))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"beta": -0.1}, ValueError, "beta: expected a finite number >= 0, got -0.1"),
        ({"beta": math.nan}, ValueError, "beta: .* got nan"),
        ({"beta": math.inf}, ValueError, "beta: .* got inf"),
        ({"beta": np.float32(-1)}, ValueError, "beta: .* got"),
        ({"beta": None}, TypeError, "beta: .* got None"),
        ({"clip": (-0.1, 0.2)}, ValueError, r"clip: .* got \(-0.1, 0.2\)"),
        ({"clip": (0.2, -0.1)}, ValueError, "clip: "),
        ({"clip": (math.nan, 0.2)}, ValueError, "clip: "),
        ({"clip": (0.2,)}, ValueError, "clip: "),
        ({"clip": (0.2, 0.2, 0.2)}, ValueError, "clip: "),
        ({"clip": 0.2}, (TypeError, ValueError), "clip: .* got 0.2"),
        ({"normalization": "mean"}, ValueError, "normalization: expected one of .* got 'mean'"),
        ({"importance": "word"}, ValueError, "importance: expected one of .* got 'word'"),
        ({"beta": True}, TypeError, "beta: .* got True"),
        ({"beta": "0.1"}, TypeError, "beta: .* got '0.1'"),
        ({"beta": np.asarray(-0.1)}, ValueError, "beta: .* got -0.1"),
        ({"beta": np.ones((2, 1))}, ValueError, r"beta: .* array of shape \(2, 1\)"),
        ({"clip": (math.nan, math.inf)}, ValueError, "clip: "),
        ({"clip": (True, 0.2)}, ValueError, "clip: "),
        ({"clip": ("0.2", "0.2")}, ValueError, "clip: "),
        ({"normalizer": 0}, ValueError, "normalizer: expected a finite number > 0, got 0"),
        ({"normalizer": -4}, ValueError, "normalizer: .* got -4"),
        ({"normalizer": math.nan}, ValueError, "normalizer: .* got nan"),
        ({"normalizer": math.inf}, ValueError, "normalizer: .* got inf"),
        ({"normalizer": True}, TypeError, "normalizer: .* got True"),
        ({"normalizer": "4"}, TypeError, "normalizer: .* got '4'"),
        ({"normalizer": np.asarray(-4)}, ValueError, "normalizer: .* got -4"),
        ({"normalizer": np.asarray([4.0, 4.0])}, ValueError, r"normalizer: .* array of shape \(2,\)"),
        ({"normalizer": np.asarray(True)}, TypeError, "normalizer: .* got"),
        ({"normalizer": [4]}, TypeError, r"normalizer: .* got \[4\]"),
        ({"kl": "k1"}, ValueError, r"kl: expected one of \('k3', 'k3_ratio'\), got 'k1'"),
        ({"mask": np.full((2, 3), 0.5)}, ValueError, "mask: expected booleans, or 0 and 1, got 0.5"),
        ({"mask": np.asarray([[0, 1, 1], [1, 2, 0]])}, ValueError, "mask: .* got 2"),
        ({"mask": np.full((2, 3), -1)}, ValueError, "mask: .* got -1"),
        ({"mask": np.full((2, 3), np.nan)}, ValueError, "mask: .* got nan"),
        ({"mask": np.ones((2, 3), dtype=complex)}, TypeError, "mask: .* got complex128"),
        ({"logp": LOGP[0]}, ValueError, r"logp: expected shape"),
        ({"logp_old": LOGP[:1]}, ValueError, r"logp_old: expected shape \(2, 3\).*got \(1, 3\)"),
        ({"logp_ref": LOGP[:, :2]}, ValueError, "logp_ref: expected shape"),
        ({"mask": np.ones(3, dtype=bool)}, ValueError, "mask: expected shape"),
        ({"advantages": np.ones(3)}, ValueError, r"advantages: expected shape \(2,\).*got \(3,\)"),
        ({"advantages": np.ones(2, dtype=int)}, TypeError, "advantages: expected a real floating dtype, got int64"),
        ({"logp": LOGP.astype(int)}, TypeError, "logp: expected a real floating dtype"),
        ({"logp_ref": LOGP.tolist()}, TypeError, "logp_ref: expected an array"),
    ],
)
def test_objective(changes: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        pcr.grpo_objective(**{**GOOD, **changes})


@pytest.mark.parametrize("clip", [(0.2, math.inf), (math.inf, math.inf)])
def test_a_bound_may_be_infinite(clip: tuple[float, float]) -> None:
    obj = pcr.grpo_objective(**{**GOOD, "logp_old": LOGP - 3, "clip": clip})
    np.testing.assert_allclose(obj.plasticity_loss, -math.exp(3) / 2, rtol=1e-15)
    assert obj.clip_fraction == 0


@pytest.mark.parametrize("value", [4, 4.0, np.float32(4), np.asarray(4), np.asarray([4.0]), np.int64(4)])
def test_one_number_may_come_as_an_array(value: Any) -> None:
    narrow = {**GOOD, **{name: GOOD[name].astype(np.float32) for name in ("logp", "logp_old", "logp_ref")}}
    got = pcr.grpo_objective(**{**narrow, "normalizer": value, "beta": value})
    expected = pcr.grpo_objective(**{**narrow, "normalizer": 4.0, "beta": 4.0})
    for name in ("plasticity_loss", "stability_loss"):
        assert getattr(got, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize(
    "changes", [{"normalizer": -4.0}, {"normalizer": 0}, {"beta": -1.0}, {"mask": np.full((2, 3), 0.5)}], ids=str
)
def test_what_is_traced_cannot_be_refused_and_comes_out_as_nan(changes: dict[str, Any]) -> None:
    jax = pytest.importorskip("jax")
    good = {**GOOD, "logp_ref": LOGP - 0.1, "normalizer": 2.0}

    def losses(changes: Any) -> Any:
        obj = pcr.grpo_objective(**{name: jax.numpy.asarray(value) for name, value in (good | changes).items()})
        return obj.plasticity_loss + obj.stability_loss, obj.stability_cotangent

    traced = jax.tree.map(jax.numpy.asarray, changes)
    for x in jax.jit(losses)(traced):
        assert jax.numpy.isnan(x).all()
    with pytest.raises(ValueError, match=next(iter(changes))):
        losses(traced)


@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.0, 0.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_advantage_that_is_not_finite_shows_clip_or_not(bad: float, clip: tuple[float, float]) -> None:
    off = {**GOOD, "advantages": np.asarray([bad, 1.0]), "clip": clip}
    with np.errstate(invalid="ignore"):
        for shift in (-0.5, 0.5):
            obj = pcr.grpo_objective(**{**off, "logp_old": LOGP + shift})
            assert not np.isfinite(obj.plasticity_cotangent[0]).any()
            assert np.isfinite(obj.plasticity_cotangent[1]).all()


@pytest.mark.parametrize("rule", [pcr.PCR(), pcr.GRPO(), pcr.NoAnchor(), pcr.MGDA()])
def test_a_total_beyond_its_dtype_is_flagged(rule: pcr.Rule) -> None:
    """Two float16 contributions of 40000 have a finite sum in float64, and none in float16."""
    p = np.asarray([[4e4, 1.0], [4e4, 1.0]], dtype=np.float16)
    s = np.asarray([[6e4, 1.0], [6e4, 1.0]], dtype=np.float16)
    with np.errstate(over="ignore"):
        res = pcr.resolve(p, s, group_ids=IDS[:2], sizes=(1, 1), rule=rule)
    assert not np.isfinite(res.update[0])
    assert np.isfinite(res.update[1])
    assert res.weights.finite.tolist() == [False, True]


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((np.ones(3), IDS[:2]), {}, ValueError, "group_ids: expected shape"),
        ((np.ones(3, dtype=int), IDS), {}, TypeError, "rewards: expected a real floating dtype"),
        ((np.ones((3, 1)), IDS), {}, ValueError, "rewards: expected shape"),
        ((np.ones(3), np.asarray([0, 0, 1])), {}, ValueError, "group_ids: a group of one response"),
        ((np.ones(1), IDS[:1]), {"scale": "batch"}, ValueError, "rewards: one response"),
        ((np.ones(3), IDS), {"scale": "prompt"}, ValueError, "scale: expected one of .* got 'prompt'"),
        ((np.ones(3), IDS), {"eps": -1}, ValueError, "eps: expected a finite number >= 0, got -1"),
        ((np.ones(3), IDS), {"eps": math.nan}, ValueError, "eps: .* got nan"),
        ((np.ones(3), IDS), {"eps": math.inf}, ValueError, "eps: .* got inf"),
        ((np.ones(3), IDS), {"eps": True}, TypeError, "eps: .* got True"),
        ((np.ones(3), IDS), {"eps": None, "scale": "none"}, TypeError, "eps: .* got None"),
    ],
)
def test_advantages(args: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pcr.group_advantages(*args, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pcr.PCR(alpha=1.5), ValueError, r"alpha: .*\[0, 1\], got 1.5"),
        (lambda: pcr.PCR(alpha=-0.1), ValueError, "alpha"),
        (lambda: pcr.PCR(alpha=math.nan), ValueError, "alpha"),
        (lambda: pcr.PCR(alpha=True), ValueError, "alpha"),
        (lambda: pcr.PCR(alpha="variances"), ValueError, "alpha: expected 'variance', 'snr' or"),
        (lambda: pcr.FixedAlpha(2), ValueError, r"alpha: expected a number in \[0, 1\], got 2"),
        (lambda: pcr.FixedAlpha("snr"), ValueError, "alpha"),
        (lambda: pcr.PCR(alpha="variance", max_boost=-1.0), ValueError, "max_boost: .* got -1.0"),
        (lambda: pcr.PCR(alpha="variance", max_boost=math.nan), ValueError, "max_boost"),
        (lambda: pcr.PCR(max_boost="3"), ValueError, "max_boost: .* got '3'"),
        (lambda: pcr.PCR(max_boost=None), ValueError, "max_boost: .* got None"),
        (lambda: pcr.PCR(max_boost=True), ValueError, "max_boost: .* got True"),
        (lambda: pcr.FixedAlpha(math.nan), ValueError, "alpha: .* got nan"),
        (lambda: pcr.FixedAlpha(np.asarray([0.5, 0.5])), ValueError, "alpha"),
        (lambda: pcr.TemporalPrior(0), ValueError, r"discount: expected a number in \(0, 1\], got 0"),
        (lambda: pcr.TemporalPrior(1.5), ValueError, "discount"),
        (lambda: pcr.TemporalPrior(math.nan), ValueError, "discount"),
        (lambda: pcr.TemporalPrior("0.9"), ValueError, "discount: .* got '0.9'"),
        (lambda: pcr.TemporalPrior(True), ValueError, "discount: .* got True"),
        (lambda: pcr.PCR(alpha="variance", prior="flat"), TypeError, "prior: expected .* got 'flat'"),
        (lambda: pcr.PCR(alpha="variance", update="anchor"), ValueError, "update: expected one of"),
        (lambda: pcr.PCR(alpha="variance", gate="hard"), ValueError, "gate: expected one of"),
        (lambda: pcr.PCR(alpha="variance", conflict="biased"), ValueError, "conflict: expected one of"),
        (
            lambda: pcr.PCR(alpha="variance", conflict="debiased", prior=pcr.TemporalPrior()),
            ValueError,
            "debiased.*TemporalPrior",
        ),
    ],
)
def test_rule_options(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((np.ones(3), np.ones(2), IDS[:2]), ValueError, "stratum_ids: expected shape"),
        ((np.ones(3), np.ones(1), IDS.astype(float)), TypeError, "stratum_ids: expected integers"),
        ((np.ones(3), np.ones(2), np.asarray([0, 0, 1])), ValueError, "stratum_ids: a stratum of one"),
        ((np.ones(4), np.ones(1), np.asarray([0, 0, 1, 1])), ValueError, r"stratum_ids: .*\[0, 1\)"),
        ((np.ones((4, 3)), np.ones((2, 3)), np.asarray([0, 0, 3, 3])), ValueError, r"stratum_ids: .*\[0, 2\)"),
        ((np.ones(2), np.ones(1), np.asarray([-1, -1])), ValueError, "stratum_ids"),
        ((np.ones((3, 2)), np.ones((1, 3)), IDS), ValueError, "stratum_dot: expected shape"),
        ((np.ones((3, 2, 1)), np.ones(1), IDS), ValueError, "response_dot: expected shape"),
    ],
)
def test_strata(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pcr.stratified_covariance(*args)


def test_statistics_of_unequal_length() -> None:
    one, two = np.ones(1), np.ones(2)
    with pytest.raises(ValueError, match=r"covariance: expected shape \(1,\).*got \(2,\)"):
        pcr.GRPO()(pcr.BlockStatistics(one, one, one, one, one, two, one))
    with pytest.raises(TypeError, match="size: expected a real floating dtype, got int64"):
        pcr.GRPO()(pcr.BlockStatistics(one, one, one, one, one, one, np.ones(1, dtype=int)))


@pytest.mark.parametrize("rule", ["pcr", pcr.PCR])
def test_a_rule_is_neither_its_name_nor_its_class(rule: Any) -> None:
    with pytest.raises(
        TypeError, match=r"rule: expected a rule such as pcr_core\.PCR\(\) or pcr_core\.make_rule\('pcr'\)"
    ):
        pcr.resolve(np.ones((2, 3)), np.ones((2, 3)), group_ids=np.asarray([0, 0]), rule=rule)
