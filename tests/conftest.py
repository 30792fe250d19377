"""Hypothesis profiles: no deadline (a first call may compile), few examples here and a fixed seed in CI."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_ALWAYS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("local", max_examples=25, **_ALWAYS)
settings.register_profile("ci", max_examples=25, derandomize=True, **_ALWAYS)
settings.register_profile("long", max_examples=1000, **_ALWAYS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local"))
