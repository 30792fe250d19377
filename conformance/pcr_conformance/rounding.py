"""The standard model of rounding: what one operation, a long sum and a function of the library may be off by.

fl(x op y) = (x op y)(1 + e), |e| <= u, plus at most the smallest normal number where the result underflows. A sum in
which a term passes through k roundings is off by at most gamma_k = k u/(1 - k u) times the sum of the terms' sizes
(Higham, Accuracy and Stability of Numerical Algorithms, chapters 3 and 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

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


Kind = Literal["any", "sequential", "blocked", "lanes", "tree", "pairwise"]
ScatterOf = Literal["deviations", "squares"]


@dataclass(frozen=True)
class Summation:
    """The order in which an implementation adds up coordinates, and what it adds up for a variance.

    Whatever is declared, a multiplication may be fused with the addition after it (one rounding less), and numbers
    below the smallest normal one may be flushed to zero, on the way in as on the way out.

    Attributes:
        kind: "any" is one after the other, a tree of unknown shape, atomic additions: always safe to declare, and the
            widest bound. "sequential" is the same bound by another name. "blocked" adds up blocks of `block` terms and
            then the blocks' sums, both in any order. "lanes" has `block` accumulators side by side, which take the
            terms in turn and are then added up in any order, as vector units and threads do. "tree" adds up blocks
            of `block` terms, then `fan_in` sums at a time, in any order, until one is left; "pairwise" is a tree of
            fan-in 2.
        block: number of terms in a block, or of lanes.
        fan_in: of a tree's nodes.
        scatter: "deviations" adds up products of c_i less the mean of its stratum. "squares" takes the sum of
            |c_i|^2, and |sum of c_i|^2 / m from it, as those must who never have all c_i at once: where responses are
            nearly identical the two cancel, so its bound is wider.

    Raises:
        ValueError: an unknown kind, a block below 1 or a fan-in below 2.

    Example:
        >>> [Summation(kind).depth(10**6) for kind in ("any", "blocked", "lanes", "tree", "pairwise")]
        [999999, 7939, 7939, 140, 140]
        >>> Summation("tree", block=16, fan_in=4).depth(16 * 64)
        24
    """

    kind: Kind
    block: int = 128
    fan_in: int = 2
    scatter: ScatterOf = "deviations"

    def __post_init__(self) -> None:
        for name, known in (("kind", get_args(Kind)), ("scatter", get_args(ScatterOf))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.block < 1 or self.fan_in < 2:
            raise ValueError(f"expected a block of 1 or more and a fan-in of 2 or more, got {self}")

    def depth(self, n: int) -> int:
        """How many additions a term of a sum of n passes through at most."""
        if self.kind in ("any", "sequential") or n <= self.block:
            return max(n - 1, 0)
        longest = -(-n // self.block)
        if self.kind in ("blocked", "lanes"):
            return self.block - 1 + longest - 1
        levels, left = 0, longest
        while left > 1:
            levels, left = levels + 1, -(-left // self.fan_in)
        return self.block - 1 + min(levels * (self.fan_in - 1), longest - 1)

    def depth_of_rows(self, rows: int, n: int) -> int:
        """The same of `rows` sums of n that become one: all terms in one sum, or sums of sums, whichever is deeper."""
        return max(self.depth(rows * n), self.depth(n) + max(rows - 1, 0))


ANY_ORDER = Summation("any")


@dataclass(frozen=True)
class Arithmetic:
    """In what an implementation computes: the dtype of its sums, and the order in which they are formed.

    `likely` asks for the statistical bound on long sums in place of the one that always holds.
    """

    accumulator: str
    summation: Summation = ANY_ORDER
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
