"""SmolLM2-135M-Instruct for long enough to tell rules apart: six rules, 150 steps, five seeds. For a GPU; not run."""

from __future__ import annotations

import functools

from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments.smollm2 import MEASURED
from benchmarks.learning.language_model import RULES, ModelSuite
from benchmarks.learning.language_model_report import report
from benchmarks.learning.sweep import Grid
from pcr_train.settings import Settings, make_settings

STEPS, HELDOUT, SAMPLES = 150, 128, 4
TASK_OPTIONS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def settings(seed: int) -> Settings:
    """Of every run of a seed, but for rule, learning rate and beta."""
    return make_settings(
        "smollm2", task_options=TASK_OPTIONS, steps=STEPS, prompts=8, heldout=HELDOUT, samples=SAMPLES, seed=seed
    )


SUITE = ModelSuite(settings, rules=RULES, grid=Grid((2e-6, 4e-6, 8e-6), (0.01, 0.04, 0.16)))

EXPERIMENT = Experiment(
    "smollm2_gpu",
    question="Does any rule train SmolLM2-135M better than GRPO?",
    protocol=(
        f"SmolLM2-135M-Instruct learns sums of two numbers of one or two digits for {STEPS} steps of 8 prompts x 8 "
        f"responses; {HELDOUT} held-out problems, {SAMPLES} responses each. The score is {MEASURED}"
    ),
    selection_seeds=(100, 101),
    confirmation_seeds=(0, 1, 2, 3, 4),
    jobs=SUITE.jobs,
    choose=SUITE.choose,
    report=functools.partial(report, SUITE),
)
