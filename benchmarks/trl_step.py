"""What does PCR add to a whole step of GRPO: generation, scoring, and the update?

`pcr-train`'s trainer (SmolLM2-135M on chain_sum by default) against TRL's own `GRPOTrainer` with the same settings,
data and seed, a few steps each, in turns. The first step of each is not counted. Beside the time on the wall stands
that of this process alone, which other work on the machine touches less.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig
from rich.progress import track
from transformers import TrainerCallback
from transformers.utils import logging
from trl import GRPOTrainer

from measure import Row, machine, rows_of
from pcr_torch.train import models
from pcr_torch.train.scoring import completions_only
from pcr_torch.train.trainer import make_trainer
from pcr_torch.trl import PCRTrainer
from pcr_train.settings import make_settings
from pcr_train.tasks import load_task

LORA = {"granularity": "global"}
EVERY = 4
WAYS: dict[str, tuple[type, Mapping[str, Any], int]] = {  # trainer, settings, every=K
    "TRL's GRPOTrainer": (GRPOTrainer, {}, 1),
    "PCR without noise": (PCRTrainer, {"noise_every": 0}, 1),
    'PCR(alpha="variance"), which needs the noise': (PCRTrainer, {"alpha": "variance"}, 1),
    "LoRA, TRL's GRPOTrainer": (GRPOTrainer, LORA, 1),
    "LoRA, PCR without noise": (PCRTrainer, {**LORA, "noise_every": 0}, 1),
    f"LoRA, PCR every={EVERY}": (PCRTrainer, {**LORA, "noise_every": 0}, EVERY),
}
CLOCKS = ("wall", "process")
DEFAULT = 10  # steps from one measurement of the noise to the next, where nothing else is said


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of each step, on the wall and of this process."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.process: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - self.began[0])
        self.process.append(time.process_time() - self.began[1])


def timed(name: str, model: str, steps: int, folder: Path) -> Clock:
    """Of some steps after a first one."""
    kind, options, every = WAYS[name]
    settings = make_settings(model, steps=steps + 1, learning_rate=1e-9, save_every=1000, heldout=4, **options)
    task = load_task(settings.task, settings.task_options, seed=settings.seed, shots=settings.shots)
    net, tokenizer = models.load(models.prepare(settings, task, folder / "start"), task.stop)
    lora = {}
    if "LoRA" in name:
        targets = ["gate_proj", "up_proj", "down_proj"]
        lora = {"peft_config": LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")}
    trainer = make_trainer(settings, folder / "run", net, tokenizer, task, task.heldout(4), kind, **lora)
    trainer.args.every = every
    clock = Clock()
    trainer.add_callback(clock)
    with completions_only():
        trainer.train()
    return clock


def measured(model: str, steps: int, rounds: int, names: list[str]) -> dict[str, dict[str, list[float]]]:
    """Mean seconds of a step by clock, way and round."""
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in names} for clock in CLOCKS}
    for _ in track(range(rounds), "rounds"):
        for name in names:
            with ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                times = timed(name, model, steps, folder)
            for clock in CLOCKS:
                seconds[clock][name].append(mean(getattr(times, clock)[1:]))
    return seconds


def shares(seconds: Mapping[str, list[float]]) -> list[Row]:
    """Ratios to TRL's trainer, LoRA's to that with LoRA; and what noise in every 10th step makes of the first two."""
    plain = {name: times for name, times in seconds.items() if "LoRA" not in name}
    names = list(plain)
    if len(names) == 3:
        mixed = zip(plain[names[1]], plain[names[2]], strict=True)
        plain["PCR() as it is: noise in every 10th step (computed)"] = [a + (b - a) / DEFAULT for a, b in mixed]
    lora = {name: times for name, times in seconds.items() if "LoRA" in name}
    return [row for each in (plain, lora) if each for row in rows_of(each, dict.fromkeys(each, 1))]


def table(rows: Mapping[str, list[Row]]) -> str:
    columns = [f"{clock}: seconds a step | times TRL's | quartiles" for clock in CLOCKS]
    lines = [f"| way | {' | '.join(columns)} |", "|---" * (1 + 3 * len(CLOCKS)) + "|"]
    for of_way in zip(*rows.values(), strict=True):
        cells = [f"{row.seconds:.2f} | {row.ratio:.2f} | {row.ratio_low:.2f} to {row.ratio_high:.2f}" for row in of_way]
        lines.append(f"| {of_way[0].name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, a local folder, or a hub id")
    parser.add_argument("--steps", type=int, default=4, help="steps of a way and round, after one that is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="ways whose name contains one of these, besides TRL's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    args = parser.parse_args()
    if args.steps < 1 or args.steps % EVERY or args.rounds < 1:
        parser.error(
            f"--steps: expected a multiple of {EVERY}, of which every={EVERY} measures one; --rounds: at least 1"
        )
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    names = [name for name in WAYS if args.only is None or "TRL's" in name or any(word in name for word in args.only)]
    seconds = measured(args.model, args.steps, args.rounds, names)
    rows = {clock: shares(seconds[clock]) for clock in CLOCKS}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"A whole step of {args.model}\n{date.today()}, {machine(device)}\n")
    print(table(rows))
    if args.json is not None:
        args.json.write_text(
            json.dumps({clock: [asdict(row) for row in rows[clock]] for clock in CLOCKS}, indent=2) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
