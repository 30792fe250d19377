"""The complementary error function, own and fallback, against mpmath - deep into the tail."""

from __future__ import annotations

import builtins
from typing import Any

import mpmath
import numpy as np
import pytest

from pcr_core._erfc import erfc, erfc_fallback

POINTS = np.concatenate([np.linspace(-6, 26, 321), [0.0, 1.3, -1.3, 1e-300, 1.2999999, 1.3000001]])
EXACT = np.asarray([float(mpmath.erfc(mpmath.mpf(float(x)))) for x in POINTS])


def test_fallback() -> None:
    np.testing.assert_allclose(erfc_fallback(np, POINTS), EXACT, rtol=1e-13)
    near = np.abs(POINTS) < 3  # where 1 - erf(x) would lose digits
    np.testing.assert_allclose(erfc_fallback(np, POINTS[near]), EXACT[near], rtol=1e-14)


@pytest.mark.parametrize("library", ["numpy", "torch", "array_api_strict"])
def test_library(library: str) -> None:
    xp = pytest.importorskip(library)
    x = xp.asarray(POINTS, dtype=xp.float64)
    found = erfc(xp, x)
    assert type(found) is type(x)
    np.testing.assert_allclose(np.asarray(found), EXACT, rtol=1e-13)


def test_numpy_takes_scipys() -> None:
    special = pytest.importorskip("scipy.special")
    np.testing.assert_array_equal(erfc(np, POINTS), special.erfc(POINTS))


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        np.testing.assert_allclose(np.asarray(erfc(jax.numpy, jax.numpy.asarray(POINTS))), EXACT, rtol=1e-12)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_scipy(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_scipy)
    np.testing.assert_allclose(erfc(np, POINTS), EXACT, rtol=1e-13)


def test_ends_and_nan() -> None:
    np.testing.assert_array_equal(erfc_fallback(np, np.asarray([np.nan, 40.0, -40.0])), [np.nan, 0.0, 2.0])
    # at infinity the series is asked for nothing that overflows
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(erfc_fallback(np, np.asarray([np.inf, -np.inf])), [0.0, 2.0])
