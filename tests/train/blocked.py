"""A Python in which some packages are not installed."""

from __future__ import annotations

import sys
from typing import Any


class _Without:
    """A finder of modules that finds none of some packages, for `import` and for `importlib.util.find_spec`."""

    def __init__(self, finder: Any, names: tuple[str, ...]) -> None:
        self.finder, self.names = finder, names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.split(".")[0] in self.names else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def block(*names: str) -> None:
    sys.meta_path[:] = [_Without(finder, names) for finder in sys.meta_path]
