"""CuPy on a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pcr_conformance.dense import DenseAdapter
from pcr_conformance.rounding import ANY_ORDER


class CupyAdapter(DenseAdapter):
    """pcr_core on CuPy's arrays."""

    name = "cupy"
    dtypes = ("float64", "float32", "float16")
    summation = ANY_ORDER  # its reductions are trees of an unstated shape

    def __init__(self, device: str = "cuda:0") -> None:
        import cupy

        self.xp = cupy
        self._number = int(device.partition(":")[2] or 0)
        self.device = f"cuda:{self._number}"
        of_card = cupy.cuda.runtime.getDeviceProperties(self._number)["name"]
        self.software = f"cupy {cupy.__version__}, {of_card.decode()}"

    @contextmanager
    def scope(self) -> Iterator[None]:
        with self.xp.cuda.Device(self._number):
            yield

    def from_numpy(self, x: Any, dtype: str) -> Any:
        with self.scope():
            return self.xp.asarray(super().from_numpy(x, dtype))

    def to_numpy(self, x: Any) -> Any:
        return super().to_numpy(self.xp.asnumpy(x))

    def device_of(self, x: Any) -> str:
        return f"cuda:{x.device.id}"
