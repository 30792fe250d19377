"""Experiments on language models: the grid, the choices, the report, and one run of each kind of rule."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

if any(importlib.util.find_spec(name) is None for name in ("trl", "reasoning_gym", "matplotlib")):
    pytest.skip("experiments on language models need the extra pcr-grpo[demo]", allow_module_level=True)

import torch

from benchmarks.learning.experiment import Experiment, Results, Row, load
from benchmarks.learning.figures import blocks
from benchmarks.learning.language_model import ModelSuite, Variant, measure, pick, score
from benchmarks.learning.language_model_report import report
from benchmarks.learning.parts import Table
from benchmarks.learning.sweep import Grid
from pcr_torch.train.tiny import make_tiny
from pcr_train.settings import Settings
from pcr_train.tasks import load_task

SUITE = ModelSuite(
    lambda seed: Settings(model="tiny", seed=seed),
    rules={"GRPO": {"rule": "grpo"}, "hard projection": {"rule": "hard"}},
    grid=Grid((1e-4, 1e-3), (0.1, 0.5)),
    variants={"fixed alpha 0.5": Variant("hard projection", {"rule": "fixed", "alpha": "0.5"})},
)


def row(rule: str, rate: float, beta: float, seed: int, learned: float, kept: float) -> Row:
    values = {
        "target_before": 0.1, "target_after": learned, "retained": kept, "text_before": 3.0, "text_after": 3.5,
        "noise_share": None, "processor_seconds": 4.0, "reward": [0.0, 1.0], "grad_norm": [1.0, 2.0],
    }  # fmt: skip
    return Row({"rule": rule, "learning_rate": rate, "beta": beta, "seed": seed}, values)


@pytest.fixture
def results() -> Results:
    """GRPO is best at the first cell, hard projection at the last; on seeds 0 and 1 hard is better by 0.1 and 0.2."""
    selection = [
        row(rule, rate, beta, 100, learned=0.5 + 0.1 * (place if rule == "hard projection" else -place), kept=0.5)
        for rule in SUITE.rules
        for place, (rate, beta) in enumerate(SUITE.grid.cells())
    ]
    choices = SUITE.choose(selection)
    confirmation = [row("GRPO", 1e-4, 0.1, seed, 0.5, 0.5) for seed in (0, 1)]
    confirmation += [row("hard projection", 1e-3, 0.5, seed, 0.7 + 0.2 * seed, 0.5) for seed in (1, 0)]
    confirmation += [row("fixed alpha 0.5", 1e-3, 0.5, 0, 0.7, 0.5)]
    return Results(selection, choices, confirmation)


def test_selection_is_the_whole_grid_and_confirmation_takes_the_choices():
    jobs = SUITE.jobs((100, 101), None)
    assert len(jobs) == len({job.key for job in jobs}) == 2 * 2 * 4
    at = {"GRPO": (1e-4, 0.1), "hard projection": (1e-3, 0.5)}
    choices = {rule: {"learning_rate": rate, "beta": beta} for rule, (rate, beta) in at.items()}
    confirmed = [job.settings for job in SUITE.jobs((0,), choices)]
    at["fixed alpha 0.5"] = at["hard projection"]
    assert {s["rule"]: (s["learning_rate"], s["beta"]) for s in confirmed} == at


def test_a_cross_is_the_middle_row_and_the_middle_column_of_the_grid():
    suite = dataclasses.replace(SUITE, grid=Grid((1.0, 2.0, 3.0), (0.1, 0.2, 0.3)), cross=True)
    assert suite.cells() == [(1.0, 0.2), (2.0, 0.1), (2.0, 0.2), (2.0, 0.3), (3.0, 0.2)]


def test_choices_are_the_best_mean_scores_and_the_first_among_equals(results: Results):
    assert results.choices == {
        "GRPO": {"learning_rate": 1e-4, "beta": 0.1},
        "hard projection": {"learning_rate": 1e-3, "beta": 0.5},
    }
    equal = [row(rule, *cell, 100, 0.5, 0.5) for rule in SUITE.rules for cell in SUITE.grid.cells()]
    assert SUITE.choose(equal)["GRPO"] == {"learning_rate": 1e-4, "beta": 0.1}


def test_the_report_pairs_by_seed_and_claims_nothing_of_variants(results: Results):
    made = report(SUITE, results)
    (claim,) = made.claims
    assert claim.statement.startswith("hard projection - GRPO")
    assert claim.interval.mean == pytest.approx(0.15)
    assert claim.interval.n == 2
    table = next(section for section in made.sections if isinstance(section, Table) and section.title == "Confirmation")
    assert [cells[0] for cells in table.rows] == ["GRPO", "hard projection", "fixed alpha 0.5"]
    assert "no conflict" in table.rows[0]


def test_an_unfinished_record_is_reported_as_far_as_it_goes(results: Results):
    assert report(SUITE, Results(results.selection, None, [])).sections == []
    assert report(SUITE, Results(results.selection, results.choices, [])).claims == []


def test_score_is_the_mean_of_learned_and_kept(results: Results):
    (found,) = pick(results.selection, "GRPO", 1e-4, 0.1)
    assert score(found) == 0.5
    assert score(row("GRPO", 1, 1, 0, learned=0.2, kept=0.8)) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["tiny", "smollm2", "smollm2_gpu"])
def test_experiments_on_language_models_load(name: str):
    experiment = load(name)
    assert isinstance(experiment, Experiment)
    assert "GRPO" in experiment.jobs.__self__.rules  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("start") / "tiny"
    make_tiny(load_task("chain_sum", shots=0), folder, seed=0, steps=150)  # solves 8 of 48
    yield folder
    torch.set_num_threads(before)


def small(start: Path, **changes: object) -> Settings:
    values = {
        "model": str(start), "shots": 0, "steps": 3, "prompts": 4, "generations": 8, "heldout": 8, "samples": 1,
        "retention_task": "chain_sum", "task": "products", "learning_rate": 1e-3, "beta": 0.5,
    }  # fmt: skip
    return Settings(**{**values, **changes})


def test_a_run_is_measured_as_a_json_record(start: Path, tmp_path: Path):
    values = measure(small(start, rule="grpo"), tmp_path / "run")
    assert values["boost"] == 0
    assert len(values["reward"]) == len(values["grad_norm"]) == 3
    assert values["known"] > 0
    assert 0 <= values["retained"] <= 1


def test_nothing_to_retain_is_refused(start: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="retention means nothing"):
        measure(small(start, retention_task="none", steps=1), tmp_path / "run")


def test_figures_of_blocks_take_what_a_run_records():
    from matplotlib.figure import Figure

    rng = np.random.default_rng(0)
    names = [f"layers.{i}.{part}.weight" for i in range(3) for part in ("mlp.up_proj", "self_attn.q_proj")]
    steps = []
    for step in (2, 3, 4):
        dot = rng.normal(size=6) * 0.5
        steps.append(
            {
                "step": step, "name": names, "layer": [0, 0, 1, 1, 2, 2], "family": ["up_proj", "q_proj"] * 3,
                "cosine": dot, "cosine_debiased": dot / 2, "dot": dot, "plasticity_sq": np.ones(6),
                "stability_sq": np.ones(6), "plasticity_var": np.ones(6), "stability_var": np.full(6, 0.5),
                "covariance": dot / 2,
            }
        )  # fmt: skip
    for draw in (blocks.heatmaps, blocks.alpha_density, blocks.update_cosines):
        figure = Figure()
        functools.partial(draw, steps=steps)(figure)
        assert all(axis.has_data() for axis in figure.axes)


def test_cosine_of_the_update_with_s_is_that_of_vectors():
    rng = np.random.default_rng(1)
    p, s = rng.normal(size=(2, 50))
    p -= 0.3 * s
    step = {
        "plasticity_sq": [p @ p], "stability_sq": [s @ s], "dot": [p @ s], "plasticity_var": [3.0],
        "stability_var": [1.0], "covariance": [0.0],
    }  # fmt: skip
    for _, rule in blocks.UPDATES.values():
        weights = rule(blocks._statistics(step)[1])
        u = weights.plasticity * p + weights.stability * s
        assert blocks._cosines(rule, step) == pytest.approx(u @ s / np.linalg.norm(u) / np.linalg.norm(s))


def test_claims_of_given_pairs(results: Results):
    suite = dataclasses.replace(SUITE, pairs=[("GRPO", "hard projection")])
    (claim,) = report(suite, results).claims
    assert claim.statement.startswith("GRPO - hard projection")
    assert claim.interval.mean == pytest.approx(-0.15)
    assert claim.headline
