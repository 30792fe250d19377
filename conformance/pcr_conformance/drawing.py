"""How the examples of a law are drawn: from a seed and a number, with a fair share of every choice.

A choice that is sampled leaves gaps: of 55 rules, a hundred samples miss nine. Here options are dealt like cards, each
once before any comes again, so what a budget covers is known in advance. An example depends on its law, the seed and
its number alone, and can be drawn again without those before it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Draw:
    """Example `index` of a law: `deal` for what has to be covered, `rng` for numbers.

    Example:
        >>> sorted(Draw("law", seed=0, index=i).deal("option", "abc") for i in range(3, 6))
        ['a', 'b', 'c']
    """

    def __init__(self, law: str, seed: int, index: int) -> None:
        self.seed, self.index = seed, index
        self._law = zlib.crc32(law.encode())
        self.rng = np.random.default_rng([seed, index, self._law])

    def deal(self, name: str, options: Sequence[T]) -> T:
        """One of the options: each comes once in every len(options) examples, in an order of its own for each name."""
        round_, place = divmod(self.index, len(options))
        shuffled = np.random.default_rng([self.seed, round_, self._law, zlib.crc32(name.encode())])
        return options[int(shuffled.permutation(len(options))[place])]

    def pick(self, options: Sequence[T]) -> T:
        """Any of the options."""
        return options[int(self.rng.integers(len(options)))]

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def coin(self) -> bool:
        return bool(self.rng.integers(2))
