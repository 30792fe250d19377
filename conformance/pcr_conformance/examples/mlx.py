"""MLX: lazy, float32, unified memory. Its arrays name no device, which pcr_core asks for: five methods instead."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

import pcr_core as pcr
from pcr_conformance.adapter import Defaults, Resolved
from pcr_conformance.cases import Case
from pcr_conformance.rounding import ANY_ORDER


class Mlx(Defaults):
    """Sums and combination in MLX's float32; alpha on the host."""

    name = "mlx"
    dtypes = ("float32", "bfloat16", "float16")
    accumulator = "float32"
    summation = ANY_ORDER  # vector lanes on a CPU, threads on a GPU: nothing is promised
    software = f"mlx {version('mlx')}"

    def __init__(self, device: str = "cpu") -> None:
        kinds = {"cpu": mx.cpu, "gpu": mx.gpu}
        if device not in kinds:
            raise ValueError(f"mlx has cpu and gpu, not {device}")
        self.device = device
        self._where = mx.Device(kinds[device])

    def from_numpy(self, x: Any, dtype: str) -> Any:
        kind = {"int": mx.int64, "bool": mx.bool_}.get(dtype) or getattr(mx, dtype)
        array = np.asarray(x)
        if array.dtype == np.float64:  # a GPU has no float64
            array = array.astype(np.float32)
        with mx.stream(self._where):
            return mx.array(array).astype(kind)

    def to_numpy(self, x: Any) -> Any:
        if x.dtype == mx.bool_:
            return np.array(x)
        with mx.stream(self._where):
            return np.array(x.astype(mx.float32)).astype(np.float64)

    def statistics(self, case: Case, dtype: str) -> pcr.BlockStatistics[Any]:
        return self._sums(case, dtype)[2]

    def weights(self, statistics: pcr.BlockStatistics[Any], rule: pcr.Rule) -> pcr.Weights[Any]:
        return rule(statistics)

    def resolve(self, case: Case, rule: pcr.Rule, dtype: str) -> Resolved:
        total_p, total_s, statistics = self._sums(case, dtype)
        weights = rule(statistics)
        with mx.stream(self._where):
            a, b = (
                self.from_numpy(np.repeat(w, case.sizes), "float32") for w in (weights.plasticity, weights.stability)
            )
            update = (a * total_p + b * total_s).astype(getattr(mx, dtype))
        back = self.to_numpy(update)
        written = [bool(np.isfinite(back[block]).all()) for block in case.blocks()]
        weights = replace(weights, finite=weights.finite & np.asarray(written))
        return Resolved(back, weights, statistics, str(update.dtype).rsplit(".", 1)[-1], self.device)

    def _sums(self, case: Case, dtype: str) -> tuple[Any, Any, pcr.BlockStatistics[Any]]:
        """Both totals (d,) in float32, and the statistics as NumPy float64."""
        shared = case.stability_group_ids is None
        with mx.stream(self._where):
            p, s = (self.from_numpy(x, dtype).astype(mx.float32) for x in (case.plasticity, case.stability))
            total_p, total_s = mx.sum(p, axis=0), mx.sum(s, axis=0)
            u = self._scattered(p, case.group_ids, case.strata)
            v = self._scattered(s, case.group_ids if shared else case.stability_group_ids, case.strata)
            rows = []
            for block in case.blocks():
                pairs = [(total_p[block], total_p[block]), (total_s[block], total_s[block])]
                pairs += [(total_p[block], total_s[block]), (u[:, block], u[:, block]), (v[:, block], v[:, block])]
                pairs += [(u[:, block], v[:, block])] if shared else []
                found = [float(mx.sum(x * y).item()) for x, y in pairs] + ([] if shared else [0.0])
                rows.append([*found, float(block.stop - block.start)])
        return total_p, total_s, pcr.BlockStatistics(*np.asarray(rows, dtype=np.float64).T)

    def _scattered(self, c: Any, ids: Any, strata: str) -> Any:
        """Contributions less their stratum's mean, times sqrt(m/(m - 1)): their squares add up to the variance."""
        _, index, count = np.unique(
            np.zeros_like(ids) if strata == "batch" else ids, return_inverse=True, return_counts=True
        )
        if (count < 2).any():
            raise ValueError("a stratum of one response tells nothing about noise")
        sums = mx.zeros((len(count), c.shape[1])).at[mx.array(index)].add(c)
        mean = sums / self.from_numpy(count[:, None], "float32")
        root = self.from_numpy(np.sqrt(count / (count - 1))[index][:, None], "float32")
        return root * (c - mean[mx.array(index)])
