"""CuPy on the first CUDA device."""

from __future__ import annotations

from typing import Any

from pcr_conformance.dense import DenseAdapter
from pcr_conformance.rounding import SEQUENTIAL


class CupyAdapter(DenseAdapter):
    """pcr_core on CuPy's arrays."""

    name = "cupy"
    dtypes = ("float64", "float32", "float16")
    summation = SEQUENTIAL  # its reductions are trees of an unstated shape
    device = "cuda:0"

    def __init__(self) -> None:
        import cupy

        self.xp = cupy

    def from_numpy(self, x: Any, dtype: str) -> Any:
        return self.xp.asarray(super().from_numpy(x, dtype))

    def to_numpy(self, x: Any) -> Any:
        return super().to_numpy(self.xp.asnumpy(x))

    def device_of(self, x: Any) -> str:
        return f"cuda:{x.device.id}"
