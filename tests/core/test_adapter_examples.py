"""Adapters for libraries that pcr_core does not know obey the laws; wrong sums behind the same declaration do not."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from pcr_conformance.examples import c_kernel
from pcr_conformance.libraries import load
from pcr_conformance.registry import LAWS
from pcr_conformance.verdict import judge, judge_all

EXAMPLES = "pcr_conformance.examples"
needs_compiler = pytest.mark.skipif(c_kernel.compiler() is None, reason="no C compiler")


def obeys(spec: str, examples: int) -> None:
    adapter = load(f"{EXAMPLES}.{spec}")
    verdicts = list(judge_all([adapter], examples, 0))
    assert [f"{v.law}: {v.message}" for v in verdicts if v.bad] == []
    assert sum(v.outcome == "passed" for v in verdicts) > 15
    assert all("numpy" not in v.software or spec.startswith("c_kernel") for v in verdicts)


@needs_compiler
def test_a_kernel_behind_numpy() -> None:
    """Lanes, fused multiplications, subnormal numbers flushed."""
    obeys("c_kernel:CKernel", 20)


def test_mlx() -> None:
    """Lazy, float32, no device on its arrays."""
    pytest.importorskip("mlx.core")
    obeys("mlx:Mlx", 20)


@pytest.mark.slow
def test_dask() -> None:
    """Lazy, in chunks: a graph of thousands of tasks for each case."""
    if find_spec("dask") is None or find_spec("dask.array") is None:
        pytest.skip("dask is not installed")
    obeys("dask:Dask", 2)


_SHORT = """static float shortened(float x) {
    union { float f; unsigned bits; } both = {x};
    both.bits &= 0xffffe000u;
    return both.f;
}
static float over_lanes"""

#: name: what in the source becomes what
WRONG: dict[str, dict[str, str]] = {
    "the last lane is left out": {"k < LANES; k++": "k < LANES - 1; k++"},
    "what fills no whole row of lanes is left out": {
        "lane[2][k] = fmaf": "if (d <= LANES || j < d - d % LANES) lane[2][k] = fmaf"
    },
    "products of 10 bits": {
        "static float over_lanes": _SHORT,
        "fmaf(a, b, lane[2][k])": "fmaf(shortened(a), b, lane[2][k])",
    },
    "accumulators of 10 bits": {
        "static float over_lanes": _SHORT,
        "lane[0][k] = fmaf(a, a, lane[0][k])": "lane[0][k] = shortened(fmaf(a, a, lane[0][k]))",
    },
    "squares where deviations are declared": {
        "- mean_x[x->stratum[i]]": "",
        "- mean_y[y->stratum[i]]": "",
        "u, v, sum);": "u, v, sum) - x->weight[i] * mean_x[x->stratum[i]] * mean_y[y->stratum[i]];",
    },
    "what is below 1e-25 is taken for zero": {
        "lane[4][k] += scatter(s, s, j, stride, mean_s, mean_s)": "float v = scatter(s, s, j, stride, mean_s, mean_s);"
        " lane[4][k] += v < 1e-25f ? 0 : v"
    },
    "the mean of all, whatever the stratum": {"mean[x->stratum[i]] +=": "mean[0] +="},
}


@needs_compiler
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_sum_is_noticed(name: str) -> None:
    source = c_kernel.SOURCE
    for old, new in WRONG[name].items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)

    class Wrong(c_kernel.CKernel):
        pass

    Wrong.source = source
    laws: Any = [law for law in LAWS if law.name in ("statistics_are_exact", "long_sums_stay_accurate")]
    assert any(judge(law, Wrong(), 100, 0).outcome == "failed" for law in laws)


def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    c_kernel.compiled.cache_clear()
    load.cache_clear()
    with pytest.raises(ValueError, match="no C compiler: set CC"):
        load(f"{EXAMPLES}.c_kernel:CKernel")
