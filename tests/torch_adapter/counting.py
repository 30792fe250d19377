"""Operators that are dispatched, by their names."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Counting(TorchDispatchMode):
    """Counts within it, those of backward passes too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def of(self, pattern: str) -> int:
        return sum(count for name, count in self.names.items() if re.search(pattern, name))

    @property
    def total(self) -> int:
        return sum(self.names.values())
