"""Our PyTorch training stacks obey the laws of trainers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from pcr_conformance.trainers import TRAINER_LAWS, load_trainer
from pcr_conformance.trainers.verdict import judge_trainer

load = cache(load_trainer)


@pytest.mark.parametrize("name", ["torch", "torch-loop"])
@pytest.mark.parametrize("law", TRAINER_LAWS, ids=lambda law: law.name)
def test_a_plain_loop(law: Any, name: str) -> None:
    verdict = judge_trainer(law, load(name), 4, 0)
    assert verdict.outcome == "passed", verdict.message


def test_trl() -> None:
    """The laws that its own tests do not have; the rest, which start processes and many trainers, are slow."""
    pytest.importorskip("trl")
    for law in TRAINER_LAWS:
        if law.name in ("update_is_the_loops", "microbatches_add_up", "resumed_run_goes_on"):
            verdict = judge_trainer(law, load("trl"), 2, 0)
            assert verdict.outcome == "passed", verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("law", TRAINER_LAWS, ids=lambda law: law.name)
def test_all_of_trl(law: Any) -> None:
    pytest.importorskip("trl")
    verdict = judge_trainer(law, load("trl"), 12, 1)
    assert not verdict.bad, verdict.message
    assert (verdict.outcome == "skipped") == (law.name == "parts_of_groups_add_up")
