"""In which steps the noise of the gradients is measured."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from pcr_core import Rule, needs_noise

DEFAULT = 10
_log = logging.getLogger("pcr_torch")


@dataclass
class Meter:
    """Steps since the last measurement, and how often one is due.

    Attributes:
        every: measure in every K-th step; 0 for never.
        optional: whether nobody asked for it: the rule does without, and no K was given.
        since: steps since the last measurement; None before the first.
    """

    every: int
    optional: bool
    since: int | None = None

    @classmethod
    def of(cls, rule: Rule, every: int | None, *, baseline: bool = False) -> Meter:
        """ValueError for an `every` that is no number of steps, or with which rule or baseline would lack the noise."""
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 0):
            raise ValueError(f"noise_every: expected an integer >= 0 (0 for never), or None, got {every!r}")
        if baseline and every == 0:
            raise ValueError(
                "noise_every=0: the baseline is estimated from the norms that are measured with the noise; leave it "
                "out, or measure in every K-th step"
            )
        if not needs_noise(rule):
            return cls(DEFAULT if every is None else every, optional=every is None and not baseline)
        if every not in (None, 1):
            raise ValueError(
                f"noise_every={every}: {rule!r} reads the noise of the gradients in every step; use noise_every=1, or "
                "a rule that does without, such as pcr_core.PCR() with a number as alpha"
            )
        return cls(1, optional=False)

    @property
    def due(self) -> bool:
        return self.every > 0 and (self.since is None or self.since + 1 >= self.every)

    def step(self, *, measured: bool) -> None:
        self.since = 0 if measured else None if self.since is None else self.since + 1

    def stop(self, why: str) -> None:
        """No more measurements, of which the rule needs none."""
        _log.info(
            "the noise of the gradients is not measured, since the rule does without and it would be slow or "
            "impossible here: %s. noise_every=K measures it in every K-th step all the same",
            why,
        )
        self.every = 0

    def state_dict(self) -> dict[str, Any]:
        return {"since": self.since, "stopped": self.optional and self.every == 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.since = state["since"]
        if self.optional and state["stopped"]:
            self.every = 0
