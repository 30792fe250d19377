"""An adapter from what somebody names, with the reason where it is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def make(what: str, factory: Any, options: Mapping[str, Any], missing: Callable[[Any], Sequence[str]]) -> Any:
    """`factory(**options)`, or the factory itself where it cannot be called.

    Args:
        what: names it in errors, such as "adapter 'module:factory'".
        missing: what an object lacks of the protocol, a line a member with the signature to write.

    Raises:
        ValueError: the factory raised.
        TypeError: the object lacks something of the protocol.
    """
    try:
        made = factory(**options) if callable(factory) else factory
    except Exception as error:
        raise ValueError(f"{what}: its factory raised {type(error).__name__}: {error}") from error
    lacking = missing(made)
    if lacking:
        lines = "".join(f"\n  {line}" for line in lacking)
        raise TypeError(f"{what}: {type(made).__name__} does not implement the protocol; it lacks{lines}")
    return made
