from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from trl.trainer import utils

import pcr_torch.train.engine as engine
from pcr_torch.train.scoring import completions_only
from pcr_train.progress import read_metrics
from pcr_train.run import Outcome


def test_a_run_scores_completions_only_and_comes_out_the_same(
    go: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Counting(utils._ChunkedLogProbFunction):  # type: ignore[misc, name-defined]
        rows = 0

        @classmethod
        def apply(cls, hidden: torch.Tensor, *rest: object) -> object:
            Counting.rows += len(hidden)
            return super().apply(hidden, *rest)

    scored = {}
    metrics = {}
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counting)
    for name, context in (("completions", completions_only), ("all", nullcontext)):
        monkeypatch.setattr(engine, "completions_only", context)
        Counting.rows = 0
        rows = read_metrics(go(tmp_path / name, steps=2, generations=8).metrics)
        scored[name] = Counting.rows
        metrics[name] = [[row[key] for key in ("reward", "kl", "grad_norm")] for row in rows]
    assert 0 < scored["completions"] < scored["all"] / 2
    assert all(row[-1] > 0 for row in metrics["all"])
    for mine, theirs in zip(metrics["completions"], metrics["all"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-8)


def test_the_switch_comes_back_after_an_error():
    before = utils._use_triton
    with suppress(RuntimeError), completions_only():
        assert utils._use_triton(torch.device("cpu"))
        raise RuntimeError
    assert utils._use_triton is before


def test_bfloat16_differs_from_float32_by_its_rounding(go: Callable[..., Outcome], tmp_path: Path):
    norms = {
        precision: read_metrics(go(tmp_path / precision, steps=1, generations=8, precision=precision).metrics)[0]
        for precision in ("float32", "bfloat16")
    }
    exact, rounded = (row["grad_norm"] for row in norms.values())
    assert 0 < exact != rounded
    assert rounded == pytest.approx(exact, rel=0.3)
