"""How names, patterns and callables pick blocks, in every adapter."""

from __future__ import annotations

from typing import Any

import pytest

from pcr_core._selection import selects


@pytest.mark.parametrize(
    ("blocks", "is_mlp", "expected"),
    [
        ("all", False, True),
        ("mlp", True, True),
        ("mlp", False, False),
        (r"layers\.1\.", False, True),
        (r"layers\.1\.", True, True),
        (r"layers\.2\.", True, False),
        ("up", False, True),
        ("al", True, False),  # a pattern, though "all" begins with it
        (lambda name, parameter: name.endswith("up") and parameter == "W", False, True),
        (lambda name, parameter: [], True, False),
        (lambda name, parameter: "together", False, "together"),
    ],
)
def test_selects(blocks: Any, is_mlp: bool, expected: bool | str) -> None:
    answer = selects(blocks, "layers.1.up", "W", is_mlp)
    assert answer == expected
    assert type(answer) is type(expected)


def test_what_is_not_a_selector() -> None:
    with pytest.raises(TypeError, match=r"blocks: expected 'mlp', 'all'.* got 3"):
        selects(3, "w", None, True)
    with pytest.raises(ValueError, match=r"blocks: '\(' is not a regular expression"):
        selects("(", "w", None, True)
