"""How a selector ("mlp", "all", a regular expression, a callable) picks parameters by name, in every adapter."""

from __future__ import annotations

import re
from typing import Any


def selects(blocks: Any, name: str, parameter: Any, is_mlp: bool) -> bool | str:
    """Whether `blocks` picks the parameter, or the name of the block that a callable puts it in.

    Raises:
        TypeError: `blocks` is neither a string nor a callable.
        ValueError: a string that is empty or not a regular expression.
    """
    if callable(blocks):
        answer = blocks(name, parameter)
        return answer if isinstance(answer, str) else bool(answer)
    if not isinstance(blocks, str):
        raise TypeError(f"blocks: expected 'mlp', 'all', a regular expression or a callable, got {blocks!r}")
    if not blocks:
        raise ValueError("blocks: '' would match every parameter; ask for 'all'")
    if blocks == "all":
        return True
    if blocks == "mlp":
        return is_mlp
    try:
        return re.search(blocks, name) is not None
    except re.error as error:
        raise ValueError(f"blocks: {blocks!r} is not a regular expression: {error}") from error
