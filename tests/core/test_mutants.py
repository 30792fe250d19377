"""The suite's own test: wrong implementations are noticed, and machine-made changes of a formula are undone."""

from __future__ import annotations

import ast

import pytest

import pcr_core as pcr
from pcr_conformance.dense import DenseAdapter
from pcr_conformance.drawing import Draw
from pcr_conformance.mutants import MUTANTS, Mutant, Wrong, attack, combined
from pcr_conformance.mutants.formulas import mutations
from pcr_conformance.mutants.generated import AND, Generated, chosen, pairs, singles
from pcr_conformance.mutants.score import equivalents, first_failure, scored
from pcr_conformance.registry import LAWS
from pcr_conformance.verdict import judge, judge_all


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_each_mutant_is_noticed_by_its_law(mutant: Mutant) -> None:
    verdict = attack(mutant)
    assert verdict.outcome == "failed"
    assert verdict.message.startswith("AssertionError"), verdict.message  # noticed, not crashed


def test_the_stages_of_the_mutants_are_right_without_a_fault() -> None:
    faultless = Wrong("faultless", "none", lambda: None)
    bad = [v for v in judge_all([faultless], 30, 0) if v.bad]
    assert not bad, bad[0].message
    for name, stage, law in (
        ("bfloat16", "none", "bfloat16_is_widened_first"),
        ("sharded", "sharded", "sharded_equals_one_device"),
        ("in place", "in place", "in_place_equals_out_of_place"),
    ):
        right = Wrong(name, stage, lambda w, p, s, sizes: (combined(w, p, s, sizes), True))
        (found,) = (judge(each, right, 20, 0) for each in LAWS if each.name == law)
        assert found.outcome == "passed", found.message


def test_formulas_are_changed_one_place_at_a_time() -> None:
    tree = ast.parse("def f(vp, vs):\n    return vp / (vp + vs)").body[0]
    assert isinstance(tree, ast.FunctionDef)
    found = {ast.unparse(mutant).split("return ")[1] for _, mutant in mutations(tree)}
    assert {"vp * (vp + vs)", "vp / (vp - vs)", "vs / (vp + vs)", "vp / vp", "vp + vs"} <= found
    assert "vp / (vp + vs)" not in found


def test_what_refuses_arguments_is_left_alone() -> None:
    tree = ast.parse("def f(a, b):\n    if a > b:\n        raise ValueError(a - b)\n    return a").body[0]
    assert isinstance(tree, ast.FunctionDef)
    assert [what.split(": ")[1] for what, _ in mutations(tree)] == ["a -> b"]


def test_a_changed_formula_is_in_force_while_it_is_asked_for() -> None:
    swapped = next(x for x in singles() if "variance_alpha" in x.name and x.name.endswith(": vp -> vs"))
    before = first_failure(DenseAdapter(), 3, 0)
    with swapped.active():
        assert first_failure(DenseAdapter(), 3, 0) is not None
    assert before is first_failure(DenseAdapter(), 3, 0) is None


def test_names_of_generated_mutants_tell_them_apart_and_the_equivalent_ones_exist() -> None:
    names = [mutant.name for mutant in singles()]
    assert len(set(names)) == len(names) > 1000
    assert set(equivalents()) <= set(names)
    assert len({x.name for x in chosen(200, 50)}) == 250
    first, second = singles()[:2]
    both = Generated(f"{first.name}{AND}{second.name}", first.sources + second.sources)
    assert both.known([first.name, second.name])
    assert not both.known([first.name])


@pytest.mark.slow
def test_nearly_all_changed_formulas_are_noticed() -> None:
    """At least 98 % of a sample that are not equivalent, pairs included, at the default budget."""
    known = equivalents()
    made = [mutant for mutant in chosen(120, 0) + pairs(singles(), 30, seed=1) if not mutant.known(known)]
    living = [outcome.name for outcome in scored(made, jobs=2) if outcome.law is None]
    assert len(living) <= 0.02 * len(made), living


def test_every_combination_of_options_is_dealt_within_the_default_budget() -> None:
    law = next(law for law in LAWS if law.name == "weights_are_exact")
    rules = [law.draw(Draw(law.name, 0, i), DenseAdapter())["rule"] for i in range(100)]
    options = {(r.alpha, r.prior, r.update, r.gate, r.conflict) for r in rules if isinstance(r, pcr.PCR)}
    assert len(options) >= 3 * 2 * 2 * 2 * 2
    assert {type(r) for r in rules} >= {
        pcr.GRPO,
        pcr.NoAnchor,
        pcr.HardProjection,
        pcr.FixedAlpha,
        pcr.PCGrad,
        pcr.MGDA,
    }
    law = next(law for law in LAWS if law.name == "objective_is_exact")
    cases = [law.draw(Draw(law.name, 0, i), DenseAdapter())["case"] for i in range(100)]
    assert len({(c.normalization, c.importance, c.kl) for c in cases}) == 16
    assert {c.clip for c in cases} >= {(0.0, 0.0), (0.2, 0.28)}


def test_a_failure_is_made_small() -> None:
    wrong = next(m for m in MUTANTS if m.name == "covariance of the wrong sign").adapter()
    (law,) = (law for law in LAWS if law.name == "statistics_are_exact")
    message = judge(law, wrong, 20, 0).message
    assert "sizes=(1,)" in message, "one coordinate of one block"
    assert len(message) < 1500
