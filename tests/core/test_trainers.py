"""The laws of training stacks: the oracle is right, a right trainer passes, and wrong ones are noticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pcr_core
from pcr_conformance.trainers import (
    TRAINER_LAWS,
    TrainerDefaults,
    TrainerProblem,
    TrainerResult,
    Unsupported,
    expected,
    judge_trainer,
    judge_trainers,
    load_trainer,
    make_problem,
)
from pcr_conformance.trainers.adapter import TRAINER_CAPABILITIES
from pcr_conformance.trainers.draw import RULES
from pcr_conformance.trainers.model import NAMES, contributions, logp
from pcr_conformance.trainers.mutants import TRAINER_MUTANTS, TrainerMutant, attack_trainer
from pcr_conformance.trainers.oracle import objective
from pcr_conformance.trainers.stacks.numpy import LoopTrainer


@pytest.mark.parametrize("stream", ["plasticity", "stability"])
def test_gradients_by_hand_are_differences_of_the_loss(stream: str) -> None:
    problem = make_problem(3, groups=(2, 3))
    (batch,) = problem.batches
    here = objective(problem, batch, problem.weights)
    each = contributions(dict(problem.weights), batch, getattr(here, f"{stream}_cotangent"))
    rng, step = np.random.default_rng(0), 1e-6
    for name in NAMES:
        way = rng.normal(size=problem.weights[name].shape)
        ends = (dict(problem.weights) | {name: problem.weights[name] + t * way} for t in (step, -step))
        up, down = (getattr(objective(problem, batch, w), f"{stream}_loss") for w in ends)
        np.testing.assert_allclose((each[name] * way).sum((1, 2)), (up - down) / (2 * step), rtol=1e-6, atol=1e-9)


def test_the_model_reads_what_came_before() -> None:
    problem = make_problem(0)
    (batch,) = problem.batches
    tokens = batch.tokens.copy()
    tokens[:, -1] = (tokens[:, -1] + 1) % 7
    same = np.isclose(logp(dict(problem.weights), replace(batch, tokens=tokens)), logp(dict(problem.weights), batch))
    assert same[:, :-1].all()
    assert not same[:, -1].any()


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=str)
def test_problems_are_such_that_the_rule_shows(rule: pcr_core.Rule) -> None:
    """Against the plain sum, by far more than what rounding may do."""
    problem = make_problem(1, rule=rule, steps=2)
    loop, plain = expected(problem), expected(replace(problem, rule=pcr_core.GRPO()))
    off = max(np.linalg.norm(loop.weights[b] - plain.weights[b]) / loop.sizes[b] for b in problem.blocks)
    assert off > 1e-3


@pytest.mark.parametrize("law", TRAINER_LAWS, ids=lambda law: law.name)
def test_a_right_trainer_passes(law: Any) -> None:
    verdict = judge_trainer(law, load_trainer("numpy"), 2 * len(RULES), 0)
    assert verdict.outcome == "passed", verdict.message
    assert verdict.worst["float64"] < 0.1


@pytest.mark.parametrize("mutant", TRAINER_MUTANTS, ids=lambda m: m.name)
def test_each_wrong_trainer_is_noticed_by_its_law(mutant: TrainerMutant) -> None:
    verdict = attack_trainer(mutant)
    assert verdict.outcome == "failed"
    assert verdict.message.startswith("AssertionError"), verdict.message  # noticed, not crashed
    assert "Again: --seed 0 --examples" in verdict.message


def test_every_law_has_a_wrong_trainer_and_every_capability_a_use() -> None:
    assert {m.law for m in TRAINER_MUTANTS} == {law.name for law in TRAINER_LAWS}
    selected = frozenset().union(*(law.needs for law in TRAINER_LAWS)) | {need for _, need in RULES}
    assert selected | {"unequal_groups", "unequal_microbatches"} == TRAINER_CAPABILITIES


class OnlyTheSum(TrainerDefaults):
    """A plain GRPO trainer, which refuses another normalisation when it meets it."""

    name = "only-the-sum"
    dtype = "float64"
    normalizations = ("grpo", "dapo")

    def train(self, problem: TrainerProblem, checkpoint: Any = None) -> TrainerResult:
        assert problem.rule == pcr_core.GRPO()
        assert len(set(np.bincount(problem.batches[0].group_ids - problem.batches[0].group_ids.min())) - {0}) == 1
        if problem.normalization == "dapo":
            raise Unsupported("no dapo")
        return LoopTrainer().train(problem)


def test_what_a_stack_cannot_do_is_skipped_and_said() -> None:
    found = {v.law: v for v in judge_trainers([OnlyTheSum()], 4, 0)}
    assert not [v for v in found.values() if v.bad]
    assert found["update_is_the_loops"].outcome == "skipped"
    assert found["update_is_the_loops"].message == "needs rules"
    some = found["sum_rule_is_the_plain_gradient"]
    assert (some.outcome, some.examples) == ("passed", 2)
    assert some.message == "2 of 4 problems not supported: no dapo"


class OnlyDapo(OnlyTheSum):
    normalizations = ("dapo",)


def test_a_law_of_which_every_problem_is_refused_is_skipped() -> None:
    verdict = judge_trainer(TRAINER_LAWS[0], OnlyDapo(), 2, 0)
    assert (verdict.outcome, verdict.examples) == ("skipped", 0)


class Crashing(OnlyTheSum):
    def train(self, problem: TrainerProblem, checkpoint: Any = None) -> TrainerResult:
        raise RuntimeError("out of memory")


def test_a_crash_is_a_failed_law_with_the_problem() -> None:
    verdict = judge_trainer(TRAINER_LAWS[0], Crashing(), 2, 0)
    assert verdict.outcome == "failed"
    for words in ("RuntimeError: out of memory", "Problem 0: GRPO()", "normalization='grpo'", "16 responses"):
        assert words in verdict.message


class NotOne(TrainerDefaults):
    capabilities = frozenset({"flying"})
    dtype = "bfloat16"


def test_what_is_missing_is_named_with_its_signature() -> None:
    with pytest.raises(TypeError) as caught:
        load_trainer(f"{__name__}:NotOne")
    for words in (
        "attribute name: str",
        "method train(self, problem: TrainerProblem, checkpoint: Any = None) -> TrainerResult",
        "['flying'] are not among",
        "dtype: expected some of",
    ):
        assert words in str(caught.value)


FILE = """
from pcr_conformance.trainers.stacks.numpy import LoopTrainer

class Mine(LoopTrainer):
    name = "mine"
"""


def test_a_trainer_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "my_trainer_of_a_test.py"
    file.write_text(FILE)
    assert load_trainer(str(file)).name == "mine"
    assert load_trainer(f"{file}:Mine").name == "mine"
    file.write_text(FILE + "class Other(LoopTrainer): ...")
    with pytest.raises(ValueError, match="found 2 classes with a method train"):
        load_trainer(str(file))
    for spec in (f"{tmp_path}/none.py", "nothing", "no_such_module:make", "pcr_core:no_such_name"):
        with pytest.raises(ValueError, match=spec.split("/")[-1]):
            load_trainer(spec)


def test_the_command(tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from pcr_conformance.command import app

    paths = {name: tmp_path / f"report.{name}" for name in ("json", "junit", "html")}
    options = [x for name, path in paths.items() for x in (f"--{name}", str(path))]

    def ran(*arguments: str) -> Any:
        return testing.CliRunner().invoke(app, ["trainers", *arguments, "--examples", "4"])

    done = ran("--adapter", f"{__name__}:OnlyTheSum", *options)
    assert done.exit_code == 0, done.output
    assert "pcr conformance: trainer, only-the-sum on cpu (eager)" in done.output
    assert "not tried: update_is_the_loops on only-the-sum: needs rules" in done.output
    assert json.loads(paths["json"].read_text())["levels"] == ["trainer"]
    for name in ("junit", "html"):
        assert "2 of 4 problems not supported: no dapo" in paths[name].read_text()
    assert ran("--adapter", f"{__name__}:Crashing").exit_code == 1
    assert ran().exit_code == ran("--adapter", "nothing").exit_code == 2
    wrong = ran("--mutants")
    assert wrong.exit_code == 0, wrong.output
    assert f"{len(TRAINER_MUTANTS)} of {len(TRAINER_MUTANTS)} killed" in wrong.output
