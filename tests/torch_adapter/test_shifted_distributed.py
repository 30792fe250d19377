"""The baseline on two processes is that of one, and the same on both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from distributed_cases import GROUPS, ROWS, STRATA, ddp, fsdp, problem
from problems import tiny_model
from torch import Tensor, nn
from worlds import run_world

import pcr_core
from pcr_torch import PCR


def shifts(model: nn.Module, rows: Sequence[int], ids: Tensor, share: float) -> list[Any]:
    """Of three steps: b as it was applied, and what it took away. Advantages well above zero call for a shift."""
    method, found = PCR(model, rule=pcr_core.GRPO(), noise_every=1, baseline=1.0, baseline_memory=0.5), []
    for seed in range(3):
        data = problem(seed)
        part = data.rows(list(rows))
        applied = method.shifted(part.advantages + 2)
        logp = part.logp(model)
        objective = pcr_core.grpo_objective(
            logp, logp.detach(), logp.detach() - 0.3, applied, part.mask, beta=0.1, normalization="dapo",
            normalizer=share * float(data.mask.sum()),
        )  # fmt: skip
        method.accumulate(logp, objective, group_ids=ids[list(rows)], advantages=applied)
        report = method.resolve()
        assert report.baseline is not None
        found.append((report.baseline.applied, report.baseline.reduction))
    return found


def work(rank: int) -> dict[str, Any]:
    return {wrapped.__name__: shifts(wrapped(tiny_model("llama")), ROWS[rank], GROUPS, 0.5) for wrapped in (ddp, fsdp)}


def test_two_processes_shift_as_one(tmp_path: Path) -> None:
    expected = shifts(tiny_model("llama"), range(12), STRATA, 1.0)
    assert expected[0][0] == 0 != expected[1][0]
    ranks = run_world(work, tmp_path)
    assert ranks[0] == ranks[1]
    for found in ranks[0].values():
        for mine, theirs in zip(found, expected, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
