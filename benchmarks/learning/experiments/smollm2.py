"""SmolLM2-135M-Instruct on a CPU: six rules, each at its own learning rate and beta, few seeds and few steps."""

from __future__ import annotations

import functools

from benchmarks.learning.experiment import Experiment
from benchmarks.learning.language_model import RULES, ModelSuite, Variant
from benchmarks.learning.language_model_report import report
from benchmarks.learning.sweep import Grid
from pcr_train.settings import Settings, make_settings

STEPS, HELDOUT, SAMPLES = 8, 32, 4
MEASURED = (
    "the mean of two numbers: the mean reward of sampled responses to held-out problems of the target (learned), and "
    "the share of one-digit products, of 48, that were solved greedily before and still are (kept). The likelihood of "
    "a fixed text is reported beside it. Every rule is swept over learning rate and beta on the selection seeds and "
    "takes its best cell to the confirmation seeds. A seed fixes problems and random numbers, so rules are paired."
)


def settings(seed: int) -> Settings:
    """Of every run of a seed, but for rule, learning rate and beta."""
    return make_settings("smollm2", steps=STEPS, heldout=HELDOUT, samples=SAMPLES, precision="bfloat16", seed=seed)


SUITE = ModelSuite(
    settings,
    rules=RULES,
    grid=Grid((4e-6, 8e-6, 1.6e-5), (0.01, 0.04, 0.16)),
    cross=True,
    # added once confirmation had been seen: that rule chose half of GRPO's learning rate, which by itself keeps more
    variants={"GRPO at the choice of 1/2": Variant("constant 1/2, capped", RULES["GRPO"])},
)

EXPERIMENT = Experiment(
    "smollm2",
    question="Does any rule train SmolLM2-135M better than GRPO within the few steps that a CPU affords?",
    protocol=(
        f"SmolLM2-135M-Instruct learns sums of two one-digit numbers for {STEPS} steps of 4 prompts x 8 "
        f"responses, matrix products in bfloat16; {HELDOUT} held-out problems, {SAMPLES} responses each. The score is "
        f"{MEASURED} Every rule runs at each learning rate with the middle beta and at each beta with the middle "
        "learning rate."
    ),
    selection_seeds=(100,),
    confirmation_seeds=(10, 11, 12, 13),
    jobs=SUITE.jobs,
    choose=SUITE.choose,
    report=functools.partial(report, SUITE),
)
