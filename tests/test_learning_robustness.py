"""The experiment on learning rates: which runs there are, and how a collapse is read off them."""

from __future__ import annotations

import importlib.util
import math

import pytest

if any(importlib.util.find_spec(name) is None for name in ("trl", "reasoning_gym", "matplotlib")):
    pytest.skip("experiments on language models need the extra pcr-grpo[demo]", allow_module_level=True)

from benchmarks.learning.experiment import Results, Row
from benchmarks.learning.experiments import robustness
from benchmarks.learning.parts import Table

CHOICES = {"learning_rate": 3e-4}


def test_runs() -> None:
    assert len(robustness.jobs((0, 1), None)) == 2 * 3
    settings = [job.settings for job in robustness.jobs((0, 1), CHOICES)]
    assert len(settings) == 2 * 5 * len(robustness.ARMS)
    assert sorted({of["learning_rate"] for of in settings}) == pytest.approx([3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3])


def test_the_best_rate_is_chosen() -> None:
    values = {1e-4: 0.3, 3e-4: 0.6, 1e-3: 0.5}
    rows = [
        Row({"arm": "GRPO", "learning_rate": rate, "seed": 0}, {"target_after": v, "retained": v})
        for rate, v in values.items()
    ]
    assert robustness.choose(rows) == CHOICES


def test_collapse() -> None:
    assert robustness.collapse({1: 0.9, 2: 0.8, 4: 0.6}, 0.7) == pytest.approx(2**1.5)
    assert robustness.collapse({1: 0.9, 2: 0.8}, 0.7) is None


def row(arm: str, learning_rate: float, seed: int) -> Row:
    """Falls by 0.2 a doubling; an arm with the baseline is better by 0.01."""
    learned = 0.9 - 0.2 * math.log2(learning_rate / 3e-4) + 0.02 * ("half of b" in arm) + 0.001 * seed
    values = {"target_before": 0.65, "target_after": learned, "retained": 1.0, "boosted": 0.5, "capped": 0.2}
    return Row({"arm": arm, "learning_rate": learning_rate, "seed": seed}, {**values, "kl": [0.1, 0.2, None]})


def test_report() -> None:
    jobs = robustness.jobs((1, 2, 3), CHOICES)
    rows = [row(**job.settings) for job in reversed(jobs)]  # type: ignore[arg-type]
    rows = [r for r in rows if r.settings["seed"] < 3 or r.settings["arm"] != "GRPO"]  # the third is unfinished
    found = robustness.report(Results([], CHOICES, rows))
    by_name = {claim.statement: claim.interval for claim in found.claims}
    gain = by_name["PCR() + half of b - PCR(), score, mean over the learning rates"]
    assert gain.mean == pytest.approx(0.01)
    assert gain.n == 2
    tables = {section.title: section for section in found.sections if isinstance(section, Table)}
    kl = next(table for title, table in tables.items() if title.startswith("KL"))
    assert set(kl.rows[0][1:]) == {"inf"}
    edges = next(table for title, table in tables.items() if title.startswith("Where"))
    assert edges.rows[0][1:] == ["2.39 x", "0.100"]  # 0.1 of score a doubling, the limit a quarter of one after 2
