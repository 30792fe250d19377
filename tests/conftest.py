"""Hypothesis profiles: no deadline (a first call may compile), few examples, and a fixed seed in CI.

The same code runs on every library, so few examples each are enough; NumPy, the fastest, gets many where it matters.
"""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import HealthCheck, settings

_ALWAYS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("local", max_examples=10, **_ALWAYS)
settings.register_profile("ci", max_examples=10, derandomize=True, **_ALWAYS)
settings.register_profile("long", max_examples=300, **_ALWAYS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local"))

# laws on structure that these obey, the other adapters are unlikely to break alone
_QUICK = ("numpy", "torch", "jax-x32", "torch-compile-aot", "jax-jit", "torch-in-place")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the laws, what adds time and little else is slow."""
    for item in items:
        law, adapter = (getattr(item, "callspec", None) and item.callspec.params.get("pcr_pair")) or (None, None)
        if law is None:
            continue
        own = frozenset({"in_place", "sharded", "compile"}) & law.needs  # what the adapter is there for
        compiled = adapter.compiled and law.level not in ("jit",)
        elsewhere = adapter.name not in _QUICK and law.level in ("core", "sharded")
        if not own and (compiled or elsewhere or adapter.name == "jax-donated"):  # jax-resolve but for its memory
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What importing has made stays: accelerate collects garbage after every training, and would look through it."""
    gc.collect()
    gc.freeze()
