"""`make_train_step` obeys the laws of trainers, with both ways of measuring the noise."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from pcr_conformance.trainers import TRAINER_LAWS, load_trainer
from pcr_conformance.trainers.verdict import judge_trainer

load = cache(load_trainer)
QUICK = ("update_is_the_loops", "order_does_not_matter", "calls_are_independent", "microbatches_add_up")


@pytest.mark.parametrize(
    "law",
    [pytest.param(law, marks=[] if law.name in QUICK else pytest.mark.slow, id=law.name) for law in TRAINER_LAWS],
)
def test_a_compiled_step(law: Any) -> None:
    verdict = judge_trainer(law, load("jax"), 1, 0)
    assert not verdict.bad, verdict.message


@pytest.mark.slow
def test_both_ways_on_two_devices() -> None:
    """In a process of its own, since JAX fixes the number of devices when it starts."""
    code = """
from pcr_conformance.trainers import judge_trainers, load_trainer
found = list(judge_trainers([load_trainer("jax"), load_trainer("jax-loop")], 3, 0))
skipped = {v.law for v in found if v.outcome == "skipped"}
assert skipped == {"parts_of_groups_add_up"}, skipped
raise SystemExit("\\n".join(f"{v.law} on {v.adapter}: {v.message}" for v in found if v.bad) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
