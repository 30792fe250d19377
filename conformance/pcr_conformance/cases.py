"""Inputs of one check, in NumPy: per-response contributions to two gradients, or log-probabilities of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Case:
    """Contributions (n, d) of each response to both gradients; `sizes` splits the d coordinates into blocks."""

    plasticity: Floats
    stability: Floats
    group_ids: Integers
    sizes: tuple[int, ...]
    stability_group_ids: Integers | None = None
    strata: Any = "group"
    regime: str = ""

    def __repr__(self) -> str:  # printed when a law fails: it has to be enough to rebuild the case
        names = ["plasticity", "stability", "group_ids"]
        if self.stability_group_ids is not None:
            names.append("stability_group_ids")
        arrays = ", ".join(f"{name}=np.array({np.asarray(getattr(self, name)).tolist()!r})" for name in names)
        return f"Case({arrays}, sizes={self.sizes}, strata={self.strata!r}, regime={self.regime!r})"

    def blocks(self) -> list[slice]:
        ends = np.cumsum(self.sizes)
        return [slice(int(end - size), int(end)) for end, size in zip(ends, self.sizes)]

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def with_block(self, block: slice) -> Case:
        """One of the blocks alone."""
        return replace(
            self,
            plasticity=self.plasticity[:, block],
            stability=self.stability[:, block],
            sizes=(block.stop - block.start,),
        )


@dataclass(frozen=True)
class ObjectiveCase:
    """Arguments of `grpo_objective`: (n, T) log-probabilities, (n,) advantages, (n, T) mask, and the options."""

    logp: Floats
    logp_old: Floats
    logp_ref: Floats
    advantages: Floats
    mask: NDArray[np.bool_]
    beta: float = 0.1
    clip: tuple[float, float] = (0.2, 0.2)
    normalization: Any = "grpo"
    importance: Any = "token"
    normalizer: float | None = None
    kl: Any = "k3"
    regime: str = field(default="", compare=False)

    def options(self) -> dict[str, Any]:
        names = ("beta", "clip", "normalization", "importance", "normalizer", "kl")
        return {name: getattr(self, name) for name in names}


def group_slots(group_ids: Integers) -> list[Integers]:
    """Positions of the responses of each group."""
    return [np.flatnonzero(group_ids == g) for g in np.unique(group_ids)]
