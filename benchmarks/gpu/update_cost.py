"""What does an update cost, in plain ones? Three models, all ways in turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.context import Context, Cut
from benchmarks.gpu.tables import Table
from benchmarks.gpu.timing import Timed, in_turns
from benchmarks.update import DOCUMENTED, Problem, Way, pcr, two_passes, vanilla

VANILLA = "vanilla: one backward pass"
TENTH = "PCR, noise in every 10th step (mean of 10)"
_ROUNDS = 9


@dataclass(frozen=True)
class Shape:
    """A model and a microbatch.

    Attributes:
        seconds: of the part's time, of those that are left.
    """

    name: str
    config: Mapping[str, Any]
    vocabulary: int
    responses: int
    tokens: int
    dtype: torch.dtype
    seconds: float

    def problem(self, device: str) -> Problem:
        made = Problem(
            device, self.responses, self.tokens, self.vocabulary, config=self.config, dtype=self.dtype, micro_batches=1
        )
        made.model.train()
        return made

    @property
    def title(self) -> str:
        return f"{self.name}, {str(self.dtype)[6:]}, {self.responses} x {self.tokens} tokens"


def _qwen2(hidden: int, mlp: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "tie_word_embeddings": True,
    }


SMALL = _qwen2(896, 4864, 24, 14, 2)
SHAPES = (
    Shape("Documented model", DOCUMENTED, 4096, 8, 512, torch.float32, 20),
    Shape("Qwen2 0.5B-like", SMALL, 151_936, 16, 256, torch.bfloat16, 35),
    Shape("Qwen2 1.5B-like", _qwen2(1536, 8960, 28, 12, 2), 151_936, 16, 512, torch.bfloat16, 60),
)
TOYS = (
    Shape("Toy", _qwen2(32, 64, 4, 2, 1), 64, 8, 8, torch.float32, 20),
    Shape("Toy", _qwen2(32, 72, 2, 2, 1), 64, 4, 9, torch.bfloat16, 20),
)


def ways(p: Problem) -> dict[str, Way]:
    """By their names in the table."""
    return {
        VANILLA: vanilla(p),
        "two plain backward passes": two_passes(p),
        "PCR without noise": pcr(p, noise_every=0),
        "PCR with noise": pcr(p, noise_every=1),
        TENTH: pcr(p, noise_every=10, updates=10),
        "PCR without noise, upper half of the layers": pcr(p, blocks=p.upper, noise_every=0),
        "PCR with noise, upper half of the layers": pcr(p, blocks=p.upper, noise_every=1),
    }


def costs(context: Context) -> Iterator[Table]:
    """A table of each shape, the most telling first."""
    shapes = TOYS if context.toy else (SHAPES[1], SHAPES[0], SHAPES[2])
    for shape in shapes:
        context.say(f"update: {shape.title}")
        table = Table(
            f"An update: {shape.title}",
            ["way", "ms", "times vanilla", "quartiles", "ms until the call returns", "peak MB beyond the weights",
             "rounds"],
        )  # fmt: skip
        try:
            _measure(context.within(shape.seconds), shape, table)
        except torch.OutOfMemoryError:
            table.notes.append("Out of memory, with gradient checkpointing too.")
        except Cut as cut:
            table.notes.append(f"Cut: {cut}.")
        yield table


def _measure(context: Context, shape: Shape, table: Table) -> None:
    problem = shape.problem(context.device)
    parameters = sum(leaf.numel() for leaf in problem.parameters.values())
    table.notes.append(f"{parameters / 1e6:,.0f} million parameters; vocabulary {shape.vocabulary:,}.")
    if context.device == "cuda" and not _fits(problem):
        torch.cuda.empty_cache()
        problem.model.gradient_checkpointing_enable({"use_reentrant": False})
        table.notes.append("With gradient checkpointing, since memory was short.")
    found = in_turns(context, ways(problem), rounds=1 if context.toy else _ROUNDS, updates={TENTH: 10})
    unit = found[VANILLA]
    for name, timed in found.items():
        table.rows.append([name, *_cells(timed, unit)])
        table.wrong |= timed.wrong


def _fits(problem: Problem) -> bool:
    """Whether the two plain passes, which hold most, do."""
    try:
        with two_passes(problem)() as job:
            job()
    except torch.OutOfMemoryError:
        problem.model.zero_grad(set_to_none=True)
        return False
    return True


def _cells(timed: Timed, unit: Timed) -> list[Any]:
    if timed.failed:
        return [timed.failed, None, None, None, None, None]
    memory = None if timed.memory is None else timed.memory / 1e6
    if unit.failed:
        return [1e3 * timed.median, None, None, None, memory, len(timed.seconds)]
    low, middle, high = timed.ratios(unit)
    host = sorted(timed.host)[len(timed.host) // 2]
    quartiles = f"{low:.2f} to {high:.2f}"
    return [1e3 * timed.median, middle, quartiles, 1e3 * host, memory, len(timed.seconds)]
