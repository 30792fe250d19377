"""GRPO and PCR, with and without the measured baseline, under both estimators of the KL, on the tiny language model."""

from __future__ import annotations

import functools

from benchmarks.learning.experiment import Experiment
from benchmarks.learning.experiments.tiny import settings
from benchmarks.learning.language_model import ModelSuite, Options
from benchmarks.learning.language_model_report import report
from benchmarks.learning.sweep import Grid

GRPO: Options = {"rule": "grpo", "noise_every": 1}
PCR: Options = {"rule": "pcr", "alpha": "0.5", "noise_every": 1}
ARMS: dict[str, Options] = {
    f"{name}{end}": {**rule, **more, "kl": kl}
    for end, kl in (("", "k3_ratio"), (", k3", "k3"))
    for name, rule, more in (
        ("GRPO", GRPO, {}),
        ("GRPO + half of b", GRPO, {"baseline": 0.5}),
        ("PCR 1/2", PCR, {}),
        ("PCR 1/2 + half of b", PCR, {"baseline": 0.5}),
    )
}
PAIRS = [
    pair
    for end in ("", ", k3")
    for pair in (
        (f"PCR 1/2{end}", f"GRPO{end}"),
        (f"GRPO + half of b{end}", f"GRPO{end}"),
        (f"PCR 1/2 + half of b{end}", f"PCR 1/2{end}"),
        (f"PCR 1/2 + half of b{end}", f"GRPO + half of b{end}"),
    )
]
SUITE = ModelSuite(
    settings,
    rules=ARMS,
    grid=Grid((1e-4, 1.8e-4, 3.2e-4, 5.6e-4, 1e-3), (0.005, 0.02, 0.1)),
    cross=True,
    pairs=PAIRS,
)

EXPERIMENT = Experiment(
    "tiny_baseline",
    question="Do PCR(1/2), half of the measured baseline, or both train a tiny transformer better, and with which KL?",
    protocol=(
        "Model, tasks, length and score of the experiment `tiny`, on other seeds; norms are measured in every step, in "
        "all arms. The KL is k3 times the ratio, TRL's default, or plain k3. Every arm runs at five learning rates at "
        "the middle beta and at three betas with the middle learning rate, and takes its best to the confirmation "
        "seeds. Predictions and criterion were written before (docs/baseline.md, section 11)."
    ),
    selection_seeds=(410, 411, 412, 413),
    confirmation_seeds=tuple(range(520, 540)),
    jobs=SUITE.jobs,
    choose=SUITE.choose,
    report=functools.partial(report, SUITE),
)
