"""What `pytest --pyargs pcr_conformance` collects: every law on every adapter that was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from pcr_conformance.verdict import check


def test_law(pcr_pair: Any, request: pytest.FixtureRequest) -> None:
    law, adapter = pcr_pair
    check(law, adapter, request.config.getoption("--pcr-examples"), request.config.getoption("--pcr-seed"))
