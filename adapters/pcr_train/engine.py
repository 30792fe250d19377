"""What a framework has to bring to a run: a model that answers, and a training loop that saves and goes on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from pcr_train.settings import Settings
from pcr_train.tasks import Problem, Task

_PLACES = {
    "torch": ("pcr_torch.train.engine", "TorchEngine", "pip install 'pcr-grpo[train]'"),
    "jax": ("pcr_jax.train.engine", "JaxEngine", "pip install 'pcr-grpo[train-jax]'"),
}


class Policy(Protocol):
    """A model that answers prompts."""

    def respond(self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """One completion a prompt, greedy at temperature 0. Leaves the model and all random states as they were."""

    def text_nll(self, text: str) -> float:
        """Mean negative log-likelihood of `text`, nats a token."""


class Engine(Policy, Protocol):
    """One run of one framework. Made from settings, a task, and the folder of the run, which holds the start model.

    Attributes:
        tokenizer: called with a list of texts, it returns {"input_ids": list of token ids for each}.
    """

    tokenizer: Any

    def __init__(self, settings: Settings, task: Task, folder: Path) -> None: ...

    @staticmethod
    def check(settings: Settings) -> None:
        """ValueError for settings that this framework does not offer, naming the option and the reason."""

    @staticmethod
    def blocks_table(settings: Settings) -> str:
        """Which of the model's matrices "mlp" puts under the rule, and why it leaves others out."""

    @staticmethod
    def configure(settings: Settings, threads: int | None) -> None:
        """Threads and warnings of the process, before anything is computed."""

    @staticmethod
    def is_complete(checkpoint: Path) -> bool:
        """Whether the checkpoint was written to its end."""

    @staticmethod
    def damaged(checkpoint: Path) -> Path | None:
        """A file of a complete checkpoint that is not whole any more."""

    def prepare(self, heldout: Sequence[Problem]) -> None:
        """Makes the trainer, on problems of the task none of which is held out; refuses bad options of a rule."""

    def train(
        self, checkpoint: Path | None, on_step: Callable[[dict[str, Any]], None], stopping: Callable[[], bool]
    ) -> int:
        """Trains up to `settings.steps`, from `checkpoint` on; the last step is saved. Returns the last step taken.

        Every step hands its row of metrics.jsonl to `on_step`; where `stopping()` is true after a step, the step is
        saved and the training ends.
        """


def load_engine(framework: str) -> type[Engine]:
    """The engine of a framework, which is imported here.

    Raises:
        ImportError: something that it needs is missing; says what to install.
    """
    module, name, install = _PLACES[framework]
    try:
        return cast(type[Engine], getattr(importlib.import_module(module), name))
    except ImportError as error:
        raise ImportError(f"--framework {framework} cannot start ({error}); install it with: {install}") from error


def response_limit(settings: Settings, task: Task, tokenizer: Any) -> int:
    """Longest response in tokens: as set, or what the task's answers need and a little more."""
    return settings.max_tokens or task.longest_answer(tokenizer) + SPARE_TOKENS


SPARE_TOKENS = 2
