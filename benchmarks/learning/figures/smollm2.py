"""One run of SmolLM2-135M under plain GRPO, every matrix of MLP and attention a block: the record for `blocks`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.learning.experiment import RESULTS
from benchmarks.learning.record import environment
from pcr_train.engine import load_engine
from pcr_train.meter import measure
from pcr_train.progress import read_metrics
from pcr_train.run import train
from pcr_train.settings import Settings, make_settings, replace_text

RECORD = RESULTS / "figures" / "smollm2.jsonl"
SETTINGS: Settings = make_settings(
    "smollm2",
    rule="grpo",
    blocks=r"(mlp|self_attn)\..*weight",
    steps=12,
    heldout=32,
    samples=1,
    seed=200,
)
COLUMNS = ("cosine", "cosine_debiased", "dot", "plasticity_sq", "stability_sq", "plasticity_var", "stability_var",
           "covariance")  # fmt: skip
DIGITS = 4


def observe(folder: Path, console: Console) -> None:
    """Runs it, or goes on with it, in `folder` (about 5 minutes on 2 idle cores), and writes the record."""
    load_engine(SETTINGS.framework).configure(SETTINGS, None)
    train(SETTINGS, folder, resume=(folder / "settings.json").exists(), console=console)
    write(folder)


def write(folder: Path) -> None:
    """The record of the run in `folder`."""
    rows = read_metrics(folder / "metrics.jsonl")
    first = rows[0]["blocks"]
    head = {"environment": environment(), "settings": json.loads((folder / "settings.json").read_text("utf-8"))}
    head["blocks"] = {key: first[key] for key in ("name", "layer", "family")}
    head["meter"] = asdict(measure(rows))
    lines = [head, *({"step": row["step"], **{key: _short(row["blocks"][key]) for key in COLUMNS}} for row in rows)]
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    replace_text(RECORD, "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines))


def read() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the run was, and the columns of every step that had both gradients (the first has no KL gradient)."""
    head, *rows = (json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines())
    steps = [{**head["blocks"], **row} for row in rows]
    return head, [step for step in steps if any(step["stability_sq"])]


def _short(column: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.{DIGITS}g}") for value in column]
