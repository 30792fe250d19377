"""NumPy, whose sums along contiguous memory are pairwise over blocks of 128."""

from __future__ import annotations

import numpy as np

from pcr_conformance.dense import DenseAdapter
from pcr_conformance.rounding import Summation


class NumpyAdapter(DenseAdapter):
    """pcr_core on NumPy's arrays."""

    summation = Summation("pairwise", 128)
    software = f"numpy {np.__version__}"
