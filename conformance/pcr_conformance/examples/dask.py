"""Dask: lazy arrays in chunks, on which pcr_core runs as it is. The conversions are all that is needed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import dask
import dask.array

from pcr_conformance.dense import DenseAdapter
from pcr_conformance.rounding import Summation

CHUNK = 2048


class Dask(DenseAdapter):
    """NumPy's sums within a chunk, then trees of four chunks at a time."""

    name = "dask"
    dtypes = ("float64", "float32")
    summation = Summation("tree", block=CHUNK, fan_in=4)
    software = f"dask {dask.__version__}"

    def scope(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = dask.config.set(scheduler="synchronous")
        return context

    def from_numpy(self, x: Any, dtype: str) -> Any:
        array = super().from_numpy(x, dtype)
        # short cases are cut as well, or they would say nothing about chunks; responses stay together
        chunks = tuple(min(CHUNK, max(3, length // 2)) for length in array.shape[-1:])
        return dask.array.from_array(array, chunks=(*array.shape[:-1], *chunks))

    def to_numpy(self, x: Any) -> Any:
        with self.scope():
            return super().to_numpy(x.compute())
