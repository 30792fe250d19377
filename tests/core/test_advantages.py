"""Advantages of rewards that are nearly alike, very large or very small, in every library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pcr_core as pcr
from pcr_conformance import oracle_objective
from pcr_conformance.libraries import library, missing

IDS = np.asarray([0, 1, 0, 0, 1, 0, 0, 0, 0])
SCALES: tuple[Any, ...] = ("group", "batch", "none")


def _each(name: str) -> Any:
    if missing(name):
        pytest.skip(str(missing(name)))
    return library(name)


def _jitted(adapter: Any, **options: Any) -> Callable[..., Any]:
    def advantages(rewards: Any, ids: Any) -> Any:
        return pcr.group_advantages(rewards, ids, **options)

    compiled: Callable[..., Any] = adapter.jax.jit(advantages) if "jit" in adapter.name else advantages
    return compiled


@pytest.mark.parametrize("eps", [1e-4, 0.0])
@pytest.mark.parametrize("name", ["numpy", "array-api-strict", "torch", "jax", "jax-jit", "jax-x32-jit"])
def test_equal_rewards_give_exactly_nothing(name: str, eps: float) -> None:
    """1e7/3 seven times over: less their float32 mean they are off by a quarter, and by -0.93 in its units."""
    adapter = _each(name)
    with adapter.scope():
        for dtype in adapter.dtypes:
            value = 1e7 / 3 if dtype != "float16" else 1e4 / 3
            rewards = adapter.from_numpy(np.where(IDS == 0, value, 0.1), dtype)
            ids = adapter.from_numpy(IDS, "int")
            for scale in SCALES if eps else ("group", "none"):
                got = adapter.to_numpy(_jitted(adapter, scale=scale, eps=eps)(rewards, ids))
                assert (got == 0).all(), (dtype, scale, got)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["numpy", "torch", "jax-jit"])
def test_nearly_equal_rewards_keep_their_digits(name: str, dtype: str) -> None:
    """Off by less than m + 2 roundings of the group's range, however large the rewards are."""
    adapter = _each(name)
    rng = np.random.default_rng(0)
    with adapter.scope():
        for size in (1.0, 1e6, 1e-6):
            drawn = adapter.from_numpy(size * (1e3 + rng.choice([0.0, 1.0, 2.0], len(IDS))), dtype)
            rewards = adapter.to_numpy(drawn)
            expected = oracle_objective.advantages(rewards, IDS, "none", 0.0)
            got = adapter.to_numpy(_jitted(adapter, scale="none")(drawn, adapter.from_numpy(IDS, "int")))
            reach = np.asarray([np.ptp(rewards[i == IDS]) for i in IDS])
            unit = 2.0**-24 if dtype == "float32" else 2.0**-53
            assert (np.abs(got - expected) <= (np.bincount(IDS)[IDS] + 2) * unit * reach).all()
            for scale in ("group", "batch"):
                expected = oracle_objective.advantages(rewards, IDS, scale, 1e-4)
                got = adapter.to_numpy(_jitted(adapter, scale=scale)(drawn, adapter.from_numpy(IDS, "int")))
                np.testing.assert_allclose(got, expected, rtol=60 * unit, atol=20 * unit)


@pytest.mark.parametrize("size", [1e20, 1e-30])
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_squares_beyond_the_dtype(size: float, scale: Any) -> None:
    rewards = np.asarray([size, 0, 0], dtype=np.float32)
    got = pcr.group_advantages(rewards, np.asarray([0, 0, 0]), scale=scale, eps=0.0)
    np.testing.assert_allclose(got, np.asarray([2, -1, -1]) / 3**0.5, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scale", SCALES)
def test_rewards_that_are_not_finite_show(bad: float, scale: Any) -> None:
    with np.errstate(invalid="ignore"):
        got = pcr.group_advantages(np.asarray([1.0, bad, 0.0, 1.0]), np.asarray([0, 0, 1, 1]), scale=scale)
    assert not np.isfinite(got[:2]).any()
    assert np.isfinite(got[2:]).all() == (scale != "batch")


def test_no_rewards() -> None:
    assert pcr.group_advantages(np.zeros(0), np.zeros(0, dtype=int)).shape == (0,)
