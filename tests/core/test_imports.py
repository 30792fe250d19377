"""Importing the core or the conformance suite starts no framework."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("pcr_core", ("torch", "jax", "scipy", "hypothesis", "mpmath")),
        ("pcr_conformance", ("torch", "jax", "hypothesis", "mpmath", "pytest")),
        ("pcr_conformance.libraries", ("torch", "jax", "hypothesis", "mpmath", "pytest")),
        ("pcr_conformance.laws", ("torch", "jax", "hypothesis", "pytest")),
    ],
)
def test_import_is_light(module: str, banned: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {banned!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
