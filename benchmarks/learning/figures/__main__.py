"""The command python -m benchmarks.learning.figures: every figure of docs/figures.md and docs/why.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks.learning.experiment import RESULTS, load
from benchmarks.learning.experiments import tiny
from benchmarks.learning.figures import blocks, smollm2, sweeps
from benchmarks.learning.parts import Plot
from benchmarks.learning.report import read_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parents[3] / "docs" / "figures"
NORMS = ("GRPO", "PCR of the paper", "PCR, snr, capped")
ALPHAS = ("GRPO", "fixed alpha 0.2", "fixed alpha 0.5", "fixed alpha 0.8", "PCR of the paper")
BLOCKS = ("GRPO", "PCR of the paper", "PCR of the paper, attention too")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def figures(
    out: Annotated[Path, typer.Option(help="folder for the PNG files")] = DOCS,
    scratch: Annotated[Path, typer.Option(help="for the run of SmolLM2")] = Path("runs/learning/figures"),
) -> None:
    """Draw all figures; first make the run of SmolLM2 that some of them need, unless it is on record."""
    console = Console()
    if not (RESULTS / "tiny" / "confirmation.jsonl").exists():
        console.print("no record of tiny; make it with: python -m benchmarks.learning run tiny", style="red")
        raise typer.Exit(2)
    if not smollm2.RECORD.exists():
        smollm2.observe(scratch, console)
    out.mkdir(parents=True, exist_ok=True)
    for name, (size, draw) in _drawings().items():
        save(out / f"{name}.png", size, draw)
        console.print(str(out / f"{name}.png"), highlight=False)


def save(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """Draws without a display; a PNG of few colours, which keeps it small."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    figure.savefig(path, metadata={"Software": None})


def _drawings() -> dict[str, tuple[tuple[float, float], Callable[[Any], None]]]:
    results = read_results(tiny.EXPERIMENT, RESULTS / "tiny")
    selected = {"suite": tiny.SUITE, "rows": results.selection}
    _, steps = smollm2.read()
    return {
        "front": ((9, 4), partial(sweeps.front, **selected, choices=results.choices)),
        "heatmap": ((9, 6), partial(blocks.heatmaps, steps=steps)),
        "gradient_norm": ((9, 4), partial(sweeps.gradient_norms, rows=results.confirmation, rules=NORMS)),
        "fixed_alpha": ((9, 3.8), partial(sweeps.variants, rows=results.confirmation, names=ALPHAS)),
        "blocks": ((9, 3.8), partial(sweeps.variants, rows=results.confirmation, names=BLOCKS)),
        "learning_rates": ((9, 4), partial(sweeps.learning_rates, **selected)),
        "alpha_density": ((9, 4), partial(blocks.alpha_density, steps=steps)),
        "update_cosine": ((8, 4), partial(blocks.update_cosines, steps=steps)),
        "why": _of_report("why", "kept"),
        "edges": _of_report("robustness", "edges"),
    }


def _of_report(experiment: str, plot: str) -> tuple[tuple[float, float], Callable[[Any], None]]:
    report = load(experiment).report(read_results(load(experiment), RESULTS / experiment))
    (found,) = (section for section in report.sections if isinstance(section, Plot) and section.name == plot)
    return found.size, found.draw


if __name__ == "__main__":
    app()
