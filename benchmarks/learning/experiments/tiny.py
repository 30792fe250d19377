"""All rules and TorchJD's on a transformer of 0.2 million parameters, each at its own learning rate and beta."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.learning.experiment import Experiment
from benchmarks.learning.language_model import PEERS, RULES, ModelSuite, Variant
from benchmarks.learning.language_model_report import report
from benchmarks.learning.sweep import Grid
from pcr_torch.train.models import cache_folder
from pcr_torch.train.tiny import make_tiny
from pcr_train.settings import Settings
from pcr_train.tasks import Problem, Task, load_task

TARGET, KNOWN = "chain_sum", "products"
START, LESSONS = 900, 1000
STEPS, PROMPTS, HELDOUT, SAMPLES = 24, 8, 24, 4
MATRICES = r"layers\.\d+\.(mlp|self_attn)\..*weight"


@dataclass(frozen=True)
class _Both:
    """Lessons of two tasks by turns, so that there is something to learn and something to keep."""

    first: Task
    second: Task

    @property
    def stop(self) -> str:
        return self.first.stop

    def corpus(self) -> Iterator[Problem]:
        return itertools.chain.from_iterable(zip(self.first.corpus(), self.second.corpus(), strict=True))


def start() -> Path:
    """A tiny model that has had lessons in both tasks; made once, in the user's cache folder."""
    folder = cache_folder() / "learning" / f"tiny-{TARGET}-{KNOWN}-{LESSONS}-{START}"
    if not (folder / "config.json").exists():
        tasks = (load_task(name, seed=START, shots=0) for name in (TARGET, KNOWN))
        make_tiny(_Both(*tasks), folder, seed=START, steps=LESSONS)  # type: ignore[arg-type]
    return folder


def settings(seed: int) -> Settings:
    """Of every run of a seed, but for rule, learning rate and beta."""
    return Settings(
        model=str(start()), task=TARGET, retention_task=KNOWN, shots=0, steps=STEPS, prompts=PROMPTS, generations=8,
        heldout=HELDOUT, samples=SAMPLES, seed=seed,
    )  # fmt: skip


SUITE = ModelSuite(
    settings,
    rules={**RULES, **PEERS},
    grid=Grid((1e-4, 3e-4, 1e-3), (0.02, 0.1, 0.5)),
    variants={
        **{
            f"fixed alpha {alpha}": Variant("PCR of the paper", {"rule": "fixed", "alpha": alpha})
            for alpha in ("0.2", "0.5", "0.8")
        },
        "PCR of the paper, attention too": Variant("PCR of the paper", {"rule": "paper", "blocks": MATRICES}),
    },
)

EXPERIMENT = Experiment(
    "tiny",
    question="Does any rule, or any aggregator of TorchJD, train a tiny transformer better than GRPO?",
    protocol=(
        f"A transformer of 0.2 million parameters is taught {TARGET} and {KNOWN} (one digit) by {LESSONS} batches of "
        "worked examples in which the teacher answers 70 % and shrugs otherwise. GRPO then trains "
        f"{TARGET} for {STEPS} steps of {PROMPTS} prompts x 8 responses, the rule acting on the MLP matrices. Learned "
        f"is the mean reward of {SAMPLES} sampled responses to each of {HELDOUT} held-out problems of {TARGET}; kept "
        f"is the share of those problems of {KNOWN}, of 48, that were solved greedily before and still are; the score "
        "is the mean of both. On the selection seeds every rule runs at each learning rate and "
        "beta, and takes its best to the confirmation seeds. All runs start "
        "from one model; a seed fixes problems and random numbers, so rules are paired."
    ),
    selection_seeds=(100, 101, 102, 103),
    confirmation_seeds=tuple(range(10, 30)),
    jobs=SUITE.jobs,
    choose=SUITE.choose,
    report=functools.partial(report, SUITE),
)
