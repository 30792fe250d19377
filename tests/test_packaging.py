"""What importing costs, what is missing says how to install it, and nothing public is undocumented or unfindable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pcr_core

ROOT = Path(__file__).parent.parent


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_core_imports_numpy_and_array_api_compat_only() -> None:
    code = (
        "import sys; before = set(sys.modules); import numpy, array_api_compat; base = set(sys.modules);"
        "import pcr_core; new = {name.split('.')[0] for name in set(sys.modules) - base};"
        "print(sorted(n for n in new if n not in sys.stdlib_module_names and n != 'pcr_core'))"
    )
    assert python(code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("missing", "module", "command"),
    [
        ("torch", "pcr_torch", "pip install 'pcr-grpo[torch]'"),
        ("trl", "pcr_torch.trl", "pip install 'pcr-grpo[trl]'"),
    ],
)
def test_a_missing_dependency_names_the_command(missing: str, module: str, command: str) -> None:
    done = python(f"import sys; sys.modules[{missing!r}] = None; import {module}")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert command in last


def test_everything_public_has_a_docstring() -> None:
    for name in pcr_core.__all__:
        thing = getattr(pcr_core, name)
        assert isinstance(thing, tuple) or thing.__doc__, name


def test_versions_agree() -> None:
    assert f"## {pcr_core.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "Version " + ".".join(pcr_core.__version__.split(".")[:2]) in (ROOT / "README.md").read_text()
