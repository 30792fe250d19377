"""The three questions that the array-API standard leaves open, asked of NumPy, the strict library and stand-ins."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import array_api_compat
import numpy as np
import pytest

from pcr_core import _namespace as ns

X = np.ones((2, 3))


def test_what_is_left_out_has_no_say() -> None:
    xp = ns.common_namespace(a=None, b=X, c=None)
    ns.require_floating(xp, a=None, b=X)
    ns.require_shape((2, None), "pairs", a=None, b=X)
    with pytest.raises(TypeError, match="c: expected a real floating dtype, got int64; cast it first"):
        ns.require_floating(xp, a=None, b=X, c=X.astype(np.int64))
    with pytest.raises(ValueError, match="c: expected shape"):
        ns.require_shape((2, 3), "pairs", a=None, b=X, c=X.T)
    with pytest.raises(TypeError, match=r"c: expected an array .*got builtins\.float"):
        ns.common_namespace(a=None, b=X, c=1.0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), r"\(\)"), ((None,), r"\(any,\)"), ((2,), r"\(2,\)"), ((2, None, 1), r"\(2, any, 1\)"), ((2, 2), r"\(2, 2\)")],
)
def test_shapes_are_shown_as_python_does(shape: tuple[int | None, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=rf"x: expected shape {expected} - pairs - got \(2, 3\)"):
        ns.require_shape(shape, "pairs", x=X)


def test_libraries_and_devices_do_not_mix() -> None:
    strict = pytest.importorskip("array_api_strict")
    here, there = strict.ones(2), strict.ones(2, device=strict.Device("device1"))
    assert ns.common_namespace(a=there, b=there) is strict
    assert ns.device_of(there) == strict.Device("device1")
    with pytest.raises(ValueError, match=r"one device, but a on .*CPU_DEVICE.*, b on .*device1"):
        ns.common_namespace(a=here, b=there)
    with pytest.raises(TypeError, match=r"one library, but a is array_api_strict\S*, b is numpy"):
        ns.common_namespace(a=here, b=X)


def test_the_widest_float() -> None:
    strict = pytest.importorskip("array_api_strict")
    assert ns.widest_float(np, X) == np.float64
    assert ns.widest_float(np, X.astype(np.float32)) == np.float64
    assert ns.widest_float(strict, strict.ones(2)) == strict.float64
    info = SimpleNamespace(dtypes=lambda kind: {"float32": strict.float32} if kind == "real floating" else {})
    narrow = SimpleNamespace(float32="float32", float64="float64", __array_namespace_info__=lambda: info)
    assert ns.widest_float(narrow, strict.ones(2)) == "float32"


@pytest.mark.parametrize(("kind", "widest"), [("mps", "float32"), ("cpu", "float64"), ("xpu", "float64")])
def test_the_widest_float_of_torch(kind: str, widest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_api_compat, "is_torch_array", lambda x: True)
    array = SimpleNamespace(device=SimpleNamespace(type=kind))
    assert ns.widest_float(SimpleNamespace(float32="float32", float64="float64"), array) == widest


def test_half_precision_is_widened_and_nothing_else_is_copied() -> None:
    assert ns.at_least_float32(np, X.astype(np.float16)).dtype == np.float32
    for dtype in (np.float32, np.float64):
        x = X.astype(dtype)
        assert ns.at_least_float32(np, x) is x


def test_values_cannot_be_seen_while_a_library_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tracer:
        pass

    def pretend(compiling: bool | None, jax: Any) -> None:
        compiler = SimpleNamespace(is_compiling=lambda: compiling)
        monkeypatch.setitem(sys.modules, "torch", None if compiling is None else SimpleNamespace(compiler=compiler))
        monkeypatch.setitem(sys.modules, "jax", jax)

    fake = SimpleNamespace(core=SimpleNamespace(Tracer=Tracer))
    for compiling in (None, False):
        for jax in (None, fake):
            pretend(compiling, jax)
            assert not ns.is_traced(X, X)
    pretend(True, None)
    assert ns.is_traced(X)
    pretend(False, fake)
    assert ns.is_traced(X, Tracer())


def test_devices_are_unknown_while_jax_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    for jax in (False, True):
        for traced in (False, True):
            monkeypatch.setattr(array_api_compat, "is_jax_array", lambda x, jax=jax: jax)
            monkeypatch.setattr(ns, "is_traced", lambda *arrays, traced=traced: traced)
            assert ns.device_of(X) == (None if jax and traced else "cpu")
            assert ns.common_namespace(a=X, b=X) is not None


@pytest.mark.parametrize(("name", "floating"), [("bfloat16", True), ("int4", False), ("bcomplex32", False)])
def test_dtypes_that_numpy_does_not_know(name: str, floating: bool) -> None:
    def isdtype(dtype: str, kind: str) -> bool:
        raise TypeError(f"{dtype} is not a NumPy dtype")

    xp, value = SimpleNamespace(isdtype=isdtype), SimpleNamespace(dtype=name)
    if floating:
        ns.require_floating(xp, x=value)
    else:
        with pytest.raises(TypeError, match=f"x: expected a real floating dtype, got {name}"):
            ns.require_floating(xp, x=value)
