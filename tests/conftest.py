"""Hypothesis profiles: no deadline (a first call may compile), few examples, and a fixed seed in CI.

The same code runs on every library, so few examples each are enough; NumPy, the fastest, gets many where it matters.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_ALWAYS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("local", max_examples=10, **_ALWAYS)
settings.register_profile("ci", max_examples=10, derandomize=True, **_ALWAYS)
settings.register_profile("long", max_examples=300, **_ALWAYS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local"))
