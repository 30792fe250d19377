from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

# found, not imported: reasoning_gym imports pycosat, for which pcr_train.tasks has a stand-in
if any(importlib.util.find_spec(name) is None for name in ("trl", "reasoning_gym")):
    pytest.skip("pcr-train needs the extra pcr-grpo[demo]", allow_module_level=True)

import torch
from filelock import FileLock
from rich.console import Console

from pcr_torch.train.tiny import make_tiny
from pcr_train.run import Outcome, train
from pcr_train.settings import Settings
from pcr_train.tasks import load_task


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has had half its lessons: it earns rewards, so a step of few responses has a gradient.

    It is made once for all processes of pytest-xdist, whose folders lie beside each other.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-model"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            torch.set_num_threads(1)
            make_tiny(load_task("chain_sum", shots=0), folder, seed=0, steps=200)
    return folder


@pytest.fixture(scope="session")
def go(tiny_folder: Path) -> Callable[..., Outcome]:
    """Runs `train` quietly with few and small steps."""

    def run(out: Path, *, resume: bool = False, tensorboard: bool = False, **changes: object) -> Outcome:
        torch.set_num_threads(1)
        values = {
            "model": str(tiny_folder), "shots": 0, "steps": 3, "prompts": 4, "generations": 4, "max_tokens": 5,
            "heldout": 16, "samples": 1, "retention_task": "none", "learning_rate": 1e-3, "save_every": 100,
        }  # fmt: skip
        settings = Settings(**{**values, **changes})
        return train(settings, out, resume=resume, console=Console(quiet=True), tensorboard=tensorboard)

    return run
