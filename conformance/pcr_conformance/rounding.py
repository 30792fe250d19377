"""The standard model of rounding: what one operation, a long sum and a function of the library may be off by.

fl(x op y) = (x op y)(1 + e), |e| <= u, plus at most the smallest normal number where the result underflows. A sum in
which a term passes through k roundings is off by at most gamma_k = k u/(1 - k u) times the sum of the terms' sizes
(Higham, Accuracy and Stability of Numerical Algorithms, chapters 3 and 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

#: one formula can be written in several ways (products of fractions that stay in range, division by a reciprocal): an
#: operation of its shortest form may cost an implementation this many roundings
C = 4

#: exp, expm1, erfc of the libraries, in units of roundoff: none is correctly rounded, vendors state 1 to 5 ulps
FUNCTION = 16

#: the chance, for each sum, that the statistical bound does not hold
FAILURE = 2.0**-40

_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
_SMALLEST_NORMAL = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}


def significand_bits(dtype: str) -> int:
    return _BITS[dtype]


def unit_roundoff(dtype: str) -> float:
    """u: half the spacing of the dtype at 1."""
    return 2.0 ** -_BITS[dtype]


def rounding_floor(dtype: str) -> float:
    """What rounding to the dtype can lose of a number that underflows; some libraries flush all subnormal numbers."""
    # halves are kept to their last subnormal digit everywhere
    return 2.0**-25 if dtype == "float16" else _SMALLEST_NORMAL[dtype]


def gamma(k: float, u: float) -> float:
    """Relative error after k roundings, whatever they are; infinite where k u reaches 1.

    Example:
        >>> gamma(2, 0.125)
        0.3333333333333333
    """
    return k * u / (1 - k * u) if k * u < 1 else math.inf


def likely_gamma(k: float, u: float, failure: float = FAILURE) -> float:
    """Relative error after k roundings that are independent of each other and zero on average: about lambda sqrt(k) u.

    It holds with a probability of at least 1 - `failure` (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, theorem 2.4:
    lambda^2 = 2 log(2 k/failure)). Sums of equal terms, where all roundings have one sign, are outside the model.

    Example:
        >>> gamma(10**6, 2.0**-24) / likely_gamma(10**6, 2.0**-24) > 100
        True
    """
    if k < 1:
        return 0.0
    rate = math.sqrt(2 * math.log(2 * k / failure))
    return math.expm1(rate * math.sqrt(k) * u + k * u * u / (1 - u))


@dataclass(frozen=True)
class Summation:
    """The order in which an implementation adds up coordinates.

    Attributes:
        kind: "sequential" is one after the other; always safe to declare, and the widest bound. "blocked" adds up
            blocks of `block` terms and then the blocks' sums, both in any order. "pairwise" adds the blocks' sums in
            pairs, then those in pairs, and so on.
        block: number of terms in a block.

    Example:
        >>> [Summation(kind).depth(10**6) for kind in ("sequential", "blocked", "pairwise")]
        [999999, 7939, 140]
    """

    kind: Literal["sequential", "blocked", "pairwise"]
    block: int = 128

    def depth(self, n: int) -> int:
        """How many additions a term of a sum of n passes through at most."""
        if self.kind == "sequential" or n <= self.block:
            return max(n - 1, 0)
        blocks = -(-n // self.block)
        across = blocks - 1 if self.kind == "blocked" else (blocks - 1).bit_length()
        return self.block - 1 + across


SEQUENTIAL = Summation("sequential")


@dataclass(frozen=True)
class Arithmetic:
    """In what an implementation computes: the dtype of its sums, and the order in which they are formed.

    `likely` asks for the statistical bound on long sums in place of the one that always holds.
    """

    accumulator: str
    summation: Summation = SEQUENTIAL
    likely: bool = False

    @property
    def unit(self) -> float:
        return unit_roundoff(self.accumulator)

    @property
    def floor(self) -> float:
        return _SMALLEST_NORMAL[self.accumulator]

    def growth(self, roundings: int) -> float:
        """The factor of the sum of the terms' sizes, after that many roundings."""
        certain = gamma(roundings, self.unit)
        return min(certain, likely_gamma(roundings, self.unit)) if self.likely else certain
