"""array-api-strict: nothing that the standard does not promise."""

from __future__ import annotations

from typing import Any

from pcr_conformance.dense import DenseAdapter
from pcr_conformance.rounding import Summation


class StrictAdapter(DenseAdapter):
    """array-api-strict: nothing that the standard does not promise."""

    name = "array-api-strict"
    dtypes = ("float64", "float32")
    summation = Summation("pairwise", 128)  # its arrays are NumPy's
    device = "CPU_DEVICE"

    def __init__(self) -> None:
        import array_api_strict

        self.xp = array_api_strict
        self.software = f"array-api-strict {array_api_strict.__version__}"

    def from_numpy(self, x: Any, dtype: str) -> Any:
        return self.xp.asarray(super().from_numpy(x, dtype))

    def to_numpy(self, x: Any) -> Any:
        return super().to_numpy(x.__array__())

    def dtype_of(self, x: Any) -> str:
        return str(x.dtype).rsplit(".", 1)[-1]

    def device_of(self, x: Any) -> str:
        return str(x.device).split("'")[1] if "'" in str(x.device) else str(x.device)
