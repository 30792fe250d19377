"""What an experiment is: a question, a protocol, seeds for selection and for confirmation, and jobs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, TypeAlias

from benchmarks.learning import experiments
from benchmarks.learning.parts import Report

Stage = Literal["selection", "confirmation"]
Choices: TypeAlias = Mapping[str, Any]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Job:
    """One line of the record.

    Attributes:
        settings: a flat JSON record that identifies the job within its stage.
        run: does it; gets a folder for partial work (made before, deleted after), returns a JSON record.
    """

    settings: Mapping[str, Any]
    run: Callable[[Path], Mapping[str, Any]]

    @property
    def key(self) -> str:
        return json.dumps(self.settings, sort_keys=True)


@dataclass(frozen=True)
class Row:
    """A job's settings and what came out."""

    settings: Mapping[str, Any]
    values: Mapping[str, Any]

    @property
    def key(self) -> str:
        return json.dumps(self.settings, sort_keys=True)


@dataclass(frozen=True)
class Results:
    """What is on record; `choices` is None before they are frozen, and `confirmation` may be unfinished."""

    selection: Sequence[Row]
    choices: Choices | None
    confirmation: Sequence[Row]


@dataclass(frozen=True)
class Experiment:
    """See the package's docstring for how one is written.

    Attributes:
        name: of the file in `experiments/` and of the folder in `results/`.
        question: one sentence.
        protocol: a paragraph: what is run, measured, chosen and compared.
        selection_seeds: all that `choose` may see.
        confirmation_seeds: run once, with the choices frozen.
        jobs: (seeds, choices) -> jobs; of selection where choices is None.
        choose: selection's rows -> JSON-able choices; a pure function of the rows.
        report: results -> tables, plots, claims.

    Raises:
        ValueError: a seed that is in both sets, or none in one.
    """

    name: str
    question: str
    protocol: str
    selection_seeds: tuple[int, ...]
    confirmation_seeds: tuple[int, ...]
    jobs: Callable[[tuple[int, ...], Choices | None], Sequence[Job]]
    choose: Callable[[Sequence[Row]], Choices]
    report: Callable[[Results], Report]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"name: expected a module's name, got {self.name!r}")
        if not self.selection_seeds or not self.confirmation_seeds:
            raise ValueError(f"{self.name}: selection and confirmation need a seed each")
        if shared := set(self.selection_seeds) & set(self.confirmation_seeds):
            raise ValueError(f"{self.name}: seeds {sorted(shared)} are in selection and in confirmation")

    def seeds(self, stage: Stage) -> tuple[int, ...]:
        return self.selection_seeds if stage == "selection" else self.confirmation_seeds


def names() -> list[str]:
    """Of all experiments."""
    return sorted(module.name for module in iter_modules(experiments.__path__))


def load(name: str) -> Experiment:
    """Raises ValueError where there is none of this name."""
    if name not in names():
        raise ValueError(f"no experiment {name!r}; there are {', '.join(names())}")
    experiment: Experiment = import_module(f"{experiments.__name__}.{name}").EXPERIMENT
    if experiment.name != name:
        raise ValueError(f"experiments/{name}.py calls itself {experiment.name!r}")
    return experiment
