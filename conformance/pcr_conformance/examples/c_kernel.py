"""A kernel of one's own: one pass of C over the contributions, compiled by the system's compiler, behind NumPy."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import pcr_core as pcr
from pcr_conformance.adapter import Defaults, Resolved
from pcr_conformance.cases import Case
from pcr_conformance.rounding import Summation

SOURCE = Path(__file__).with_suffix(".c").read_text(encoding="utf-8")


def compiler() -> str | None:
    """The system's C compiler, as $CC or cc."""
    return shutil.which(os.environ.get("CC", "cc"))


@cache
def compiled(source: str) -> ctypes.CDLL:
    """The kernel as a library of this process.

    Raises:
        RuntimeError: there is no compiler, or it refuses the source.
    """
    found = compiler()
    if found is None:
        raise RuntimeError("no C compiler: set CC, or install one")
    with tempfile.TemporaryDirectory() as folder:  # a loaded library needs its file no more
        file, library = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
        file.write_text(source, encoding="utf-8")
        done = subprocess.run(
            [found, "-O2", "-shared", "-fPIC", str(file), "-o", str(library), "-lm"], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{found} refuses the kernel: {done.stderr}")
        return ctypes.CDLL(str(library))


class CKernel(Defaults):
    """float32 sums in sixteen lanes; what is wider than a block's seven numbers never leaves C."""

    name = "c-kernel"
    dtypes = ("float32", "float16")
    accumulator = "float32"
    summation = Summation("lanes", 16)
    software = f"C kernel, numpy {np.__version__}, {platform.machine()}"
    source = SOURCE

    def __init__(self) -> None:
        self._kernel = compiled(self.source)

    def from_numpy(self, x: Any, dtype: str) -> Any:
        return np.asarray(x, dtype={"int": "int64"}.get(dtype, dtype))

    def to_numpy(self, x: Any) -> Any:
        return x if x.dtype == np.bool_ else np.asarray(x, dtype=np.float64)

    def statistics(self, case: Case, dtype: str) -> pcr.BlockStatistics[Any]:
        return self._sums(case, dtype)[2]

    def weights(self, statistics: pcr.BlockStatistics[Any], rule: pcr.Rule) -> pcr.Weights[Any]:
        return rule(statistics)  # on the host, where float64 costs nothing

    def resolve(self, case: Case, rule: pcr.Rule, dtype: str) -> Resolved:
        total_p, total_s, statistics = self._sums(case, dtype)
        weights = rule(statistics)
        update = np.empty(sum(case.sizes), dtype=np.float32)
        for i, block in enumerate(case.blocks()):
            self._kernel.pcr_combine(
                _pointer(total_p[block]),
                _pointer(total_s[block]),
                ctypes.c_float(weights.plasticity[i]),
                ctypes.c_float(weights.stability[i]),
                ctypes.c_long(block.stop - block.start),
                _pointer(update[block]),
            )
        update = update.astype(dtype)
        # sums may be finite and the update beyond the dtype that it is written in
        written = [bool(np.isfinite(update[block]).all()) for block in case.blocks()]
        weights = replace(weights, finite=weights.finite & np.asarray(written))
        return Resolved(update.astype(np.float64), weights, statistics, str(update.dtype), self.device)

    def _sums(self, case: Case, dtype: str) -> tuple[Any, Any, pcr.BlockStatistics[Any]]:
        """Both totals (d,) in float32, and the statistics as NumPy float64."""
        d = sum(case.sizes)
        shared = case.stability_group_ids is None
        p, s = (
            np.ascontiguousarray(self.from_numpy(x, dtype), dtype=np.float32) for x in (case.plasticity, case.stability)
        )
        strata_p = _strata(case.group_ids, case.strata)
        strata_s = strata_p if shared else _strata(case.stability_group_ids, case.strata)
        total_p, total_s = np.empty(d, dtype=np.float32), np.empty(d, dtype=np.float32)
        rows = []
        for block in case.blocks():
            six = np.empty(6, dtype=np.float32)
            failed = self._kernel.pcr_sums(
                ctypes.byref(_Stream.of(p[:, block], *strata_p)),
                ctypes.byref(_Stream.of(s[:, block], *strata_s)),
                ctypes.c_long(d),
                ctypes.c_long(block.stop - block.start),
                int(shared),
                *(_pointer(x) for x in (total_p[block], total_s[block], six)),
            )
            if failed:
                raise MemoryError("the kernel has no room for the means")
            rows.append([*six.tolist(), float(block.stop - block.start)])
        return total_p, total_s, pcr.BlockStatistics(*np.asarray(rows, dtype=np.float64).T)


class _Stream(ctypes.Structure):
    """As in C; the arrays must live as long as it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("c", "stratum", "weight", "size")),
        ("n", ctypes.c_int),
    )

    @classmethod
    def of(cls, *arrays: Any) -> _Stream:
        return cls(*(_pointer(x) for x in arrays), len(arrays[0]))


def _strata(ids: Any, strata: str) -> tuple[Any, Any, Any]:
    """Of each response its stratum and m/(m - 1); of as many strata as responses, most of them empty, the size."""
    _, index, count = np.unique(
        np.zeros_like(ids) if strata == "batch" else ids, return_inverse=True, return_counts=True
    )
    if (count < 2).any():
        raise ValueError("a stratum of one response tells nothing about noise")
    size = np.ones(len(ids), dtype=np.float32)
    size[: len(count)] = count
    return index.astype(np.int32), (count / (count - 1))[index].astype(np.float32), size


def _pointer(x: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)
