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
from pcr_conformance.compare.measure import Agreement, Row, compare
from pcr_conformance.compare.problems import REGIMES, TOKEN_REGIMES, problem, tokens
from pcr_conformance.compare.quantities import QUANTITIES, RULE
from pcr_conformance.compare.reference import evaluate, update_error
from pcr_conformance.compare.token_reference import as_seen, cotangents
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
    ],
)
def test_bad_questions_are_one_line_and_exit_code_2(options: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["compare", "--adapters", "numpy", *options])
    assert done.exit_code == 2
    assert words in done.output
