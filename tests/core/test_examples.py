"""The examples in the documentation strings are true."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ("objective", "statistics", "posterior", "projection", "rules", "resolve")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"pcr_core.{name}")
    failures, tried = doctest.testmod(module)
    assert failures == 0
    assert tried > 0
