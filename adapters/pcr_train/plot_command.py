"""`pcr-train plot`: the picture of a run drawn again from its metrics.jsonl, or of several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcr_train import plots
from pcr_train.comparison import Run, draw_runs, read_run

HELP = """
Draw the plot of a run again, or of several runs side by side.

Reads metrics.jsonl alone, so it works while a run is going on, after one that was stopped, and with files copied from
another machine. No model is loaded.

\b
Examples:
  pcr-train plot runs/tiny-chain_sum-pcr-s0
      the plot at a run's end, again, into that folder
  pcr-train plot runs/tiny-chain_sum-pcr-s0 runs/tiny-chain_sum-grpo-s0
      two runs in one picture, runs.png
  pcr-train plot runs/tiny-* --out tiny.svg
      all of them, as SVG
  pcr-train plot metrics.jsonl --out run.png
      a file without its folder

One run: reward, KL, gradient norms, conflict by layer and step, alpha and KL weight by kind of module. Several: a line
for each run, named by the settings in which the runs differ, and one picture of cosines by layer and step for each, all
in the same colours.
"""


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs, or files like metrics.jsonl.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The picture; the suffix says what it is: png, svg, pdf. [RUN/plot.png; of several runs.png]"
        ),
    ] = None,
) -> None:
    read = [read_run(path) for path in runs]
    path = out or _default(read)
    suffix = path.suffix.lower()
    if suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out: expected a file that ends with .png, .svg or .pdf, got {path}")
    if len(read) == 1:
        plots.draw(read[0].rows, path, title=read[0].title)
    else:
        draw_runs(read, path)
    typer.echo(f"plot    {path}")


def _default(runs: list[Run]) -> Path:
    return runs[0].file.parent / "plot.png" if len(runs) == 1 else Path("runs.png")
