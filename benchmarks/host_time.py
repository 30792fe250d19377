"""What does PCR ask of the host? Updates of a model so small that Python and dispatch are all they cost.

    python benchmarks/host_time.py

24 layers of hidden size 32, as deep as a model of 0.5B: on an accelerator the host takes about as long for the larger
one. Processor time, each way once a round and in turns, after an update that is not counted.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from datetime import date
from typing import Any

import torch

from measure import machine, rows_of
from update import Problem, pcr, two_passes, vanilla

DEEP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def measured(rounds: int) -> dict[str, list[float]]:
    """Seconds of each way."""
    p = Problem("cpu", 8, 16, 64, config=DEEP)
    ways = {
        "vanilla: one backward pass": vanilla(p),
        "two plain backward passes": two_passes(p),
        "PCR without noise": pcr(p, noise_every=0),
        "PCR with noise": pcr(p, noise_every=1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            with way() as job:
                job()
                times = []
                for _ in range(3):
                    gc.collect()
                    start = time.process_time()
                    job()
                    times.append(time.process_time() - start)
                seconds[name].append(statistics.median(times))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds = measured(args.rounds)
    print(f"{date.today()}, {machine('cpu')}\n\n| way | ms | times the first | quartiles |\n|---|---|---|---|")
    for row in rows_of(seconds, dict.fromkeys(seconds, 1)):
        print(
            f"| {row.name} | {1e3 * row.seconds:.1f} | {row.ratio:.2f} | {row.ratio_low:.2f} to {row.ratio_high:.2f} |"
        )


if __name__ == "__main__":
    main()
