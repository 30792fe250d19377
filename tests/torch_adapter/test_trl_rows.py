"""Rows that a derived trainer drops, repeats, moves or rewrites keep their group, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from trl import GRPOTrainer
from trl_runs import GROUP, train
from trl_subclasses import ONE_STEP, derived

from pcr_torch.method import PCR
from pcr_torch.trl import PCRConfig, PCRTrainer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("same_micro_batches")]


def rows_of(inputs: Any, rows: list[int]) -> dict[str, Any]:
    return {k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == 2 * GROUP else v for k, v in inputs.items()}


KEPT = [0, 1, 4, 5]  # two of each prompt


KINDS = {
    "dropped": KEPT,
    "repeated": [0, 0, 1, 1, 4, 4, 5, 5],
    "moved": [4, 5, 6, 7, 0, 1, 2, 3],
    "mixed": [0, 4, 1, 5],
}


@pytest.mark.parametrize(
    ("place", "method", "kind"),
    [
        *(("below", "_generate_and_score_completions", kind) for kind in KINDS),
        ("below", "_prepare_inputs", "dropped"),
        ("below", "_compute_loss", "repeated"),
        ("above", "_generate_and_score_completions", "moved"),
        ("above", "_prepare_inputs", "mixed"),
        ("above", "compute_loss", "dropped"),
        ("above", "_compute_loss", "mixed"),
    ],
)
def test_rows_keep_their_group(
    place: str, method: str, kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = KINDS[kind]

    def changed(super_: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        if "loss" in method:
            return super_(args[0], rows_of(args[1], rows), *args[2:], **kwargs)
        return rows_of(super_(*args, **kwargs), rows)

    seen: list[Any] = []
    accumulate = PCR.accumulate_cotangents

    def watched(self: Any, *args: Any, group_ids: Tensor, **kwargs: Any) -> None:
        seen.append(group_ids.tolist())
        accumulate(self, *args, group_ids=group_ids, **kwargs)

    monkeypatch.setattr(PCR, "accumulate_cotangents", watched)
    below = derived(GRPOTrainer, **{method: changed})
    cls: Any = type("Both", (PCRTrainer, below), {}) if place == "below" else derived(PCRTrainer, **{method: changed})
    train(cls, PCRConfig, folder, tmp_path, **ONE_STEP, rule="grpo")
    (ids,) = seen
    expected = [row // GROUP for row in rows]
    assert [[a == b for b in ids] for a in ids] == [[a == b for b in expected] for a in expected]
