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
