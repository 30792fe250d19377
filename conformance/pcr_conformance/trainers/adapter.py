"""What a training stack has to offer so that the laws can check it."""

from __future__ import annotations

import inspect
from typing import Any, Literal, Protocol, get_args

from pcr_conformance.trainers.problem import Normalization, TrainerProblem, TrainerResult

TrainerCapability = Literal[
    "rules", "noise", "state", "unequal_groups", "microbatches", "unequal_microbatches", "split_groups", "processes",
    "resume", "statistics",
]  # fmt: skip
TRAINER_CAPABILITIES: frozenset[str] = frozenset(get_args(TrainerCapability))


class Unsupported(Exception):
    """Raised by `train` for a problem that the stack cannot take; reported as skipped, with these words."""


class TrainerAdapter(Protocol):
    """A training stack under check: a name, a few declarations and one method. `TrainerDefaults` supplies the rest.

    Attributes:
        name: for reports.
        capabilities: what it can do beyond a plain GRPO step of one batch; each selects laws or problems.
        normalizations: of the loss, among "grpo", "dapo" and "dr_grpo".
        dtype: "float32" or "float64", of its weights and sums.
        compiled: whether each new rule or shape costs a compilation (checks then use fewer).
        device: where it trains.
        software: name and version of what it computes with, for reports.
    """

    @property
    def name(self) -> str: ...
    @property
    def capabilities(self) -> frozenset[str]: ...
    @property
    def normalizations(self) -> tuple[Normalization, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def compiled(self) -> bool: ...
    @property
    def device(self) -> str: ...
    @property
    def software(self) -> str: ...

    def train(self, problem: TrainerProblem, checkpoint: Any = None) -> TrainerResult:
        """One step a batch from the problem's weights, or from a checkpoint of an earlier result.

        With a checkpoint weights and all other state come from there, and `problem` holds the batches that are left.
        """


class TrainerDefaults:
    """What an adapter need not write: float32, one process, the plain sum, nothing else."""

    capabilities: frozenset[str] = frozenset()
    normalizations: tuple[Normalization, ...] = ("grpo",)
    dtype: str = "float32"
    compiled: bool = False
    device: str = "cpu"
    software: str = ""


def missing_trainer_members(adapter: Any) -> list[str]:
    """What an object lacks of the protocol, each as a line that names what to write.

    Example:
        >>> class Mine(TrainerDefaults):
        ...     name = "mine"
        >>> missing_trainer_members(Mine())
        ['method train(self, problem: TrainerProblem, checkpoint: Any = None) -> TrainerResult']
    """
    lines = []
    for name, member in vars(TrainerAdapter).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            if not hasattr(adapter, name):
                lines.append(f"attribute {name}: {inspect.signature(member.fget).return_annotation}")  # type: ignore[arg-type]
        elif not callable(getattr(adapter, name, None)):
            lines.append(f"method {name}{inspect.signature(member)}".replace("'", ""))
    unknown = frozenset(getattr(adapter, "capabilities", ())) - TRAINER_CAPABILITIES
    if unknown:
        lines.append(f"capabilities: {sorted(unknown)} are not among {sorted(TRAINER_CAPABILITIES)}")
    for name, allowed in (("normalizations", get_args(Normalization)), ("dtype", ("float32", "float64"))):
        value = getattr(adapter, name, allowed[0])
        given = (value,) if isinstance(value, str) else tuple(value)
        if not given or not set(given) <= set(allowed):
            lines.append(f"{name}: expected some of {allowed}, got {value!r}")
    return lines
