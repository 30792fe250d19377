"""The comparison of frameworks: its reference against exact arithmetic, what it sees, and what it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from pcr_conformance import oracle, oracle_objective
from pcr_conformance.command import app
from pcr_conformance.compare.conclude import of_agreement, of_change, of_row
from pcr_conformance.compare.measure import Agreement, Row, compare, labels
from pcr_conformance.compare.problems import REGIMES, TOKEN_REGIMES, problem, tokens
from pcr_conformance.compare.quantities import QUANTITIES, RULE
from pcr_conformance.compare.reference import evaluate, update_error
from pcr_conformance.compare.token_reference import as_seen, cotangents
from pcr_conformance.compare.versions import Change, Run, changes, read
from pcr_conformance.dense import DenseAdapter
from pcr_conformance.libraries import load


@pytest.mark.parametrize("regime", REGIMES)
def test_the_reference_is_the_oracle_to_float64(regime: str) -> None:
    case = problem(regime, 200, seed=3)
    (exact,) = oracle.statistics(case)
    found = evaluate(case, RULE)
    pair = oracle.weights(RULE, exact)
    for name in ("p2", "s2", "c", "vp", "vs", "vps"):
        assert abs(found.sums[name] - float(getattr(exact, name))) <= 2.0**-52 * found.scales[name]
    assert float(found.pair.b) == pytest.approx(float(pair.b), rel=1e-13)
    assert float(found.pair.alpha or 0) == pytest.approx(float(pair.alpha or 0), rel=1e-15)
    a, b = float(pair.a), float(pair.b)
    update = a * case.plasticity.sum(0) + b * case.stability.sum(0)
    assert update_error(case, found, update) <= 1e-13
    assert update_error(case, found, update * (1 + 1e-6)) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("regime", TOKEN_REGIMES)
def test_the_reference_of_tokens_is_the_oracle_to_float64(regime: str) -> None:
    case = as_seen(load("numpy"), tokens(regime, 40, seed=3), "float32")
    exact = oracle_objective.objective(case)
    plasticity, stability = cotangents(case)
    np.testing.assert_allclose(plasticity, exact.plasticity_cotangent, rtol=4e-16, atol=0)
    np.testing.assert_allclose(stability, exact.stability_cotangent, rtol=4e-16, atol=1e-30)


def test_careless_cotangents_are_seen() -> None:
    class Off(DenseAdapter):
        """Near the reference exp(gap) - 1 loses what expm1 keeps."""

        name = "off"

        def objective(self, case: Any, dtype: str) -> Any:
            good = super().objective(case, dtype)
            gap = np.where(case.mask, case.logp_ref - case.logp, 0).astype(dtype)
            lost = (np.exp(gap) - 1) / np.where(gap == 0, 1, np.expm1(gap))
            return type(good)(**{**vars(good), "stability_cotangent": good.stability_cotangent * lost})

    rows = list(compare([load("numpy"), Off()], ["float32"], [4000], ["tokens near the reference"], seed=0))
    good, bad, pair = rows
    assert isinstance(good, Row)
    assert isinstance(bad, Row)
    assert isinstance(pair, Agreement)
    assert good.ulps is not None
    assert bad.ulps is not None
    assert set(good.ulps) == {"plasticity cotangent", "stability cotangent"}
    assert max(good.ulps.values()) < 1
    assert bad.ulps["stability cotangent"] > 10
    assert pair.differences["plasticity cotangent"] == 0


class Careless(DenseAdapter):
    """Sums in float32, one after the other."""

    name = "careless"
    accumulator = "float32"

    def resolve(self, case: Any, rule: Any, dtype: str) -> Any:
        good = super().resolve(case, rule, dtype)
        running = np.cumsum(case.plasticity.sum(0).astype("f4") ** 2, dtype="f4")[-1:]
        statistics = type(good.statistics)(**{**vars(good.statistics), "plasticity_sq": running.astype(float)})
        return type(good)(good.update, good.weights, statistics, good.dtype, good.device)


class Downgraded(Careless):
    """The same, and says that it is float64."""

    accumulator = "float64"


def test_a_careless_sum_is_seen_and_a_careful_one_is_not() -> None:
    found = list(compare([load("numpy"), Careless()], ["float32", "bfloat16"], [20_000], ["conflict"], seed=0))
    rows = {(row.adapter, row.dtype): row for row in found if isinstance(row, Row)}
    assert not rows["numpy", "bfloat16"].offered
    good, bad = (rows[name, "float32"] for name in ("numpy", "careless"))
    assert good.errors is not None
    assert bad.errors is not None
    assert good.errors["plasticity_sq"] < 1e-15
    assert bad.errors["plasticity_sq"] > 1e-7
    assert good.repeatable
    (pair,) = (each for each in found if isinstance(each, Agreement))
    assert pair.differences["plasticity_sq"] == pytest.approx(bad.errors["plasticity_sq"], rel=1e-6)
    assert pair.differences["update"] == 0


def test_the_command_writes_a_page_of_its_own_and_json(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, record = tmp_path / "page.html", tmp_path / "record.json"
    options = [
        "--adapters",
        "numpy",
        "--dtypes",
        "float32,bfloat16",
        "--sizes",
        "10,1e3",
        "--regimes",
        "conflict,tokens off policy",
    ]
    done = CliRunner().invoke(
        app, ["compare", *options, "--html", str(page), "--json", str(record)], env={"COLUMNS": "130"}
    )
    assert done.exit_code == 0, done.output
    assert "lacks it" in done.output
    content = json.loads(record.read_text())
    assert len(content["rows"]) == 8
    assert set().union(*(row["errors"] for row in content["rows"] if row["errors"])) == set(QUANTITIES)
    text = page.read_text()
    assert "<svg" in text
    assert not re.findall(r"(?:src|href)=[\"'](?!#)", text.replace('xlink:href="#', ""))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapters", "nothing"], "expected module:factory"),
        (["--dtypes", "float8"], "dtypes: expected some of"),
        (["--sizes", "ten"], "sizes: expected numbers"),
        (["--regimes", "calm"], "regime: expected one of"),
        (["--adapters", "numpy,numpy@cpu"], "numpy on cpu is there twice"),
        (["--adapters", "numpy@cuda:0"], "numpy has arrays on the CPU only"),
        (["--before", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_questions_are_one_line_and_exit_code_2(options: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["compare", "--adapters", "numpy", *options])
    assert done.exit_code == 2
    assert words in done.output


def row(ulps: float | None, *, order: float = 0.0, digest: str = "", **facts: Any) -> Row:
    """One quantity in float32; None: not offered."""
    if ulps is None:
        return Row("one", "float32", 10, "conflict", offered=False)
    found = {"dot": ulps * 2.0**-23}
    facts = {"repeatable": True, "digest": digest or f"{ulps}"} | facts
    return Row("one", "float32", 10, "conflict", True, found, {"dot": ulps}, {"dot": order}, seconds=0.0, **facts)


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (row(None), "The adapter takes no such input."),
        (row(0.7), "Right to 0.7 ulp in every number, whatever the order of the coordinates."),
        (row(3, order=1e-8, repeatable=False), "Right to 3.0 ulp .* in either order .*; two runs gave different bits."),
        (
            row(8390, order=1e-3),
            r"Of dot no more than 2 digits are right \(8e\+03 ulp off\), .* long sums lose digits.",
        ),
        (row(838), r"Of dot no more than 4 digits are right \(838.0 ulp off\), in either order of the coordinates."),
        (row(float("inf")), "Not usable here: dot came out as no finite number."),
    ],
)
def test_a_row_says_what_to_conclude(measured: Row, said: str) -> None:
    assert re.fullmatch(said, of_row(measured))


def test_two_adapters_are_interchangeable_or_one_is_off() -> None:
    pair = Agreement("one", "other", "float32", 10, "conflict", {"dot": 1e-7})
    good, bad = row(1), row(1e4)
    assert of_agreement(pair, good, good) == "The same bits."
    assert of_agreement(pair, good, row(2)).startswith("Interchangeable: they differ by at most 1e-07, in dot")
    assert of_agreement(pair, good, bad).endswith("off from the reference: one.")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (row(None), row(None), "Taken by neither."),
        (row(None), row(1), "Not taken before, and now it is."),
        (row(1), row(None), "Taken before, and no more."),
        (row(1, digest="a"), row(1, digest="a"), "Nothing changed: the same bits."),
        (row(1), row(2), "Other bits, as good: every number is right to rounding in both."),
        (row(1), row(400), "Worse: dot went from 1.0 ulp off to 400.0 ulp."),
        (row(400), row(1), "Better: dot went from 400.0 ulp off to 1.0 ulp."),
        (row(400), row(500), "Other bits, about as good as before."),
        (row(1), row(float("inf")), "Worse: dot went from 1.0 ulp off to inf ulp."),
    ],
)
def test_a_change_between_versions_says_what_became_of_it(before: Row, after: Row, said: str) -> None:
    assert of_change(Change(before, after)) == said


def test_two_runs_are_held_against_each_other(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    before, page = tmp_path / "before.json", tmp_path / "page.html"
    few = ["compare", "--dtypes", "float32", "--sizes", "1e3", "--regimes", "conflict"]
    first = CliRunner().invoke(app, [*few, "--adapters", "numpy", "--json", str(before)])
    assert first.exit_code == 0, first.output
    same = CliRunner().invoke(app, [*few, "--adapters", "numpy", "--before", str(before), "--html", str(page)])
    assert same.exit_code == 0, same.output
    assert "numpy, 1 of 1 rows: Nothing changed: the same bits." in same.output
    assert "Against an earlier run" in page.read_text()
    assert f"numpy {np.__version__} on cpu" in page.read_text()

    content = json.loads(before.read_text())
    content["rows"][0] |= {"digest": "", "ulps": dict.fromkeys(content["rows"][0]["ulps"], 0.0)}
    content["rows"][0]["adapter"] = "careless"
    before.write_text(json.dumps(content))
    worse = CliRunner().invoke(app, [*few, "--adapters", f"{__name__}:Downgraded", "--before", str(before)])
    assert worse.exit_code == 1, worse.output
    assert "Worse: plasticity_sq" in " ".join(worse.output.split())
    for options, words in (
        (["--adapters", "numpy"], "no adapter, dtype, size and regime in common"),
        (["--seed", "1"], "those of seed 0; run with --seed 0"),
        (["--before", str(page)], "not a JSON of pcr-conformance compare"),
    ):
        refused = CliRunner().invoke(app, [*few, "--adapters", "numpy", "--before", str(before), *options])
        assert refused.exit_code == 2
        assert words in " ".join(refused.output.split())


def test_numbers_that_json_cannot_spell_come_back(tmp_path: Path) -> None:
    from datetime import date

    from pcr_conformance.compare.page import as_json

    file = tmp_path / "run.json"
    file.write_text(as_json([row(float("inf"))], [], 3, date(2026, 1, 1)))
    run = read(file)
    assert run.rows == [row(float("inf"))]
    assert run.seed == 3
    with pytest.raises(ValueError, match="seed 3 and seed 4"):
        changes(run, Run("", 4, {}, run.rows))


def test_adapters_on_two_devices_are_told_apart() -> None:
    one, other = DenseAdapter(), DenseAdapter()
    other.device = "cuda:0"
    assert labels([one, Careless(), other]) == ["numpy on cpu", "careless", "numpy on cuda:0"]
