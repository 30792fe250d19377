"""How long does a rule take to decide? Statistics of 90 blocks (the MLP matrices of SmolLM2-135M) in, weights out.

    python benchmarks/decide.py            # from the repository's root; rows of TorchJD where it is installed

A decision is taken once per optimizer step. TorchJD's aggregators get each block's 2 x 2 Gram matrix, as in training
(`learning/peers.py`); in their usual form they would also form it from stacked gradients (`resolve.py` times that).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

import pcr_core
from measure import Way, compare, show

BLOCKS, DECISIONS = 90, 3
RULES = {
    "GRPO": "grpo",
    "PCR": "pcr",
    "PCGrad": "pcgrad",
    "MGDA": "mgda",
    **{f"{name} (TorchJD)": f"benchmarks.learning.peers:{name}" for name in ("PCGrad", "MGDA", "UPGrad", "CAGrad")},
}


def statistics(generator: torch.Generator) -> pcr_core.BlockStatistics[torch.Tensor]:
    """Of random gradients, about half of the blocks in conflict; float64 on the CPU, as adapters have them."""
    p, s = torch.randn(2, BLOCKS, 8, generator=generator, dtype=torch.float64)
    one = torch.ones(BLOCKS, dtype=torch.float64)
    return pcr_core.BlockStatistics((p * p).sum(1), (s * s).sum(1), (p * s).sum(1), one, one, 0 * one, 8 * one)


def way(name: str, stats: pcr_core.BlockStatistics[torch.Tensor]) -> Way:
    @contextmanager
    def bound() -> Iterator[Callable[[], None]]:
        rule = pcr_core.make_rule(name)

        def job() -> None:
            for _ in range(DECISIONS):
                rule(stats)

        yield job

    return bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21, help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    sys.path.append(str(Path(__file__).parents[1]))
    torch.set_num_threads(1)
    stats = statistics(torch.Generator().manual_seed(0))
    needs = {"(TorchJD)": "torchjd", "UPGrad": "quadprog", "CAGrad": "clarabel"}
    ways: dict[str, Way] = {}
    for label, name in RULES.items():
        missing = [module for word, module in needs.items() if word in label and find_spec(module) is None]
        if missing:
            print(f"{label}: its row is left out, since {', '.join(missing)} is not installed")
        else:
            ways[label] = way(name, stats)
    rows = compare(ways, repeats=arguments.repeats, device="cpu", held=0)
    show(f"{DECISIONS} decisions on {BLOCKS} blocks", rows, "cpu", arguments.json)


if __name__ == "__main__":
    main()
