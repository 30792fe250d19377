from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pcr_core
from pcr_train.meter import measure
from pcr_train.progress import block_columns, read_metrics
from pcr_train.run import Outcome


def row(step: int, dot: list, covariance: list, squares: tuple = (1.0, 1.0)) -> dict:
    n = len(dot)
    return {
        "step": step,
        "blocks": {
            "name": [f"block {i}" for i in range(n)],
            "dot": dot,
            "covariance": covariance,
            "plasticity_sq": [squares[0]] * n,
            "stability_sq": [squares[1]] * n,
        },
    }


def test_share_and_counts_by_hand():
    rows = [
        row(1, [-1.0, -0.5, 0.25, 0.1], [-0.5, 0.0, 0.5, 0.3]),
        row(2, [-1.0, 0.5, 0.25, 0.1], [-1.5, 0.0, 0.5, 0.3]),
    ]
    meter = measure(rows)
    assert meter.noise_share == pytest.approx(2.0 / 2.5)  # block 0 twice and block 1 once; the others never
    assert (meter.raw, meter.debiased, meter.blocks, meter.steps) == (1, 2, 4, 2)
    assert meter.chance == pytest.approx(4 / 4)  # two heads of two tosses: 1/4
    assert meter.sentence == (
        "Of the conflict measured over the run, 0.80 is sampling noise that both gradients share. Without it, 2 of "
        "4 blocks are in conflict in more than half of the steps (as measured: 1; if each sign were the toss of a "
        "coin: 1)."
    )


def test_steps_without_a_kl_gradient_and_numbers_that_are_not_finite_do_not_count():
    rows = [row(1, [0.0], [0.0], (1.0, 0.0)), row(2, [None], [1.0]), row(3, [-1.0], [0.5]), {"step": 4}]
    meter = measure(rows)
    assert (meter.noise_share, meter.raw, meter.blocks, meter.chance) == (-0.5, 1, 1, 0.5)


def test_no_conflict_and_nothing_measured_are_said_so():
    quiet = measure([row(1, [1.0, 2.0], [0.0, 0.0])])
    assert math.isnan(quiet.noise_share)
    assert quiet.sentence == "None of the 2 blocks was in conflict at any of 1 steps."
    assert "no conflict was measured" in measure([row(1, [1.0], [0.0]) | {"blocks": {}}, row(1, [], [])]).sentence
    assert "noise of the gradients was not measured" in measure([{"step": 1}]).sentence


@pytest.mark.parametrize(("mean", "shared", "expected"), [(0.0, 1.0, 1.0), (1.0, 0.0, 0.0)])
def test_shared_noise_without_conflict_reads_one_and_conflict_without_shared_noise_reads_zero(
    mean: float, shared: float, expected: float
):
    """S = -mean + own noise - shared part of P's noise, in 60 steps of 4 groups of 8 responses, 3 blocks of 40."""
    rng = np.random.default_rng(0)
    groups, sizes = np.arange(32) // 8, (40, 40, 40)
    rows = []
    for step in range(60):
        noise, own = rng.normal(size=(2, 32, 120))
        stability = -mean - shared * noise + (0.0 if shared else own)
        res = pcr_core.resolve(mean + noise, stability, group_ids=groups, rule=pcr_core.GRPO(), sizes=sizes)
        assert set(res.weights.plasticity) == set(res.weights.stability) == {1.0}
        rows.append(
            {
                "step": step,
                "blocks": block_columns(
                    list("abc"), [0, 1, 2], ["layers"] * 3, list("abc"), res.weights, res.statistics
                ),
            }
        )
    meter = measure(rows)
    assert meter.noise_share == pytest.approx(expected, abs=0.03)
    assert meter.raw == 3
    debiased = np.mean([r["blocks"]["cosine_debiased"] for r in rows])
    assert debiased == pytest.approx(np.mean([r["blocks"]["cosine"] for r in rows]) * (1 - expected), abs=0.1)


def test_a_rule_that_needs_no_noise_has_it_now_and_then(go: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = go(tmp_path / "run", rule="pcr", alpha=0.5, steps=3, noise_every=2)
    rows = read_metrics(outcome.metrics)
    assert [row["path"] for row in rows] == ["fast", "autograd", "fast"]
    assert ["covariance" in row["blocks"] for row in rows] == [True, False, True]
    assert ["pcr/plasticity_nsr" in row for row in rows] == [True, False, True]
    assert "in 2 of 3 steps" in outcome.meter.sentence or "at any of 2 steps" in outcome.meter.sentence
    assert outcome.plot.exists()


def test_a_run_of_plain_grpo_observes_and_changes_nothing(go: Callable[..., Outcome], tmp_path: Path):
    outcome = go(tmp_path / "run", rule="grpo", beta=0.5, steps=6, generations=16, noise_every=1)
    rows = read_metrics(outcome.metrics)
    assert {row["path"] for row in rows} == {"fast"}
    for blocks in (r["blocks"] for r in rows):
        assert set(blocks["a"]) == set(blocks["b"]) == {1.0}
    assert outcome.meter == measure(rows)
    assert outcome.meter.blocks == 12
    last = rows[-1]
    dot, shared = (np.array(last["blocks"][key]) for key in ("dot", "covariance"))
    assert last["pcr/conflict_rate_debiased"] == np.mean(dot < shared)
    opposed = dot < 0
    assert last["pcr/noise_share"] == pytest.approx(shared[opposed].sum() / dot[opposed].sum() if opposed.any() else 0)
