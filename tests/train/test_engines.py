"""pcr-train starts no framework that was not asked for, and says what to install for one that is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FRAMEWORKS = ("torch", "jax", "flax", "transformers", "trl", "optax", "orbax")
TORCH, JAX = ("torch", "transformers", "trl", "tokenizers"), ("jax", "jaxlib", "flax", "optax", "orbax")


def python(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)


def test_the_command_and_its_tasks_import_no_framework() -> None:
    code = (
        "import sys, pcr_train.command, pcr_train.plots, pcr_train.lessons;"
        "pcr_train.command.tasks.load_task('chain_sum').heldout(2);"
        f"print([name for name in {FRAMEWORKS} if name in sys.modules])"
    )
    done = python(code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(("framework", "absent"), [("torch", JAX), ("jax", TORCH)])
def test_one_framework_starts_without_the_other(framework: str, absent: tuple[str, ...]) -> None:
    done = python(
        f"from blocked import block; block(*{absent}); from pcr_train.engine import load_engine;"
        f"print(load_engine({framework!r}).__name__)"
    )
    assert done.stdout.strip() == {"torch": "TorchEngine", "jax": "JaxEngine"}[framework], done.stderr


@pytest.mark.parametrize(
    ("framework", "absent", "command"),
    [
        ("torch", "torch", "pip install 'pcr-grpo[train]'"),
        ("torch", "trl", "pip install 'pcr-grpo[train]'"),
        ("jax", "jax", "pip install 'pcr-grpo[train-jax]'"),
        ("jax", "flax", "pip install 'pcr-grpo[train-jax]'"),
        ("jax", "orbax", "pip install 'pcr-grpo[train-jax]'"),
    ],
)
def test_a_missing_framework_names_what_to_install(framework: str, absent: str, command: str) -> None:
    code = (
        f"from blocked import block; block({absent!r}); import sys; from pcr_train.command import main;"
        f"sys.argv = ['pcr-train', '--framework={framework}', '--model=tiny', '--out=/nonexistent/run']; main()"
    )
    done = python(code)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"pcr-train: --framework {framework} cannot start (")
    assert command in line
