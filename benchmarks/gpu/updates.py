"""What an update costs: three models like Qwen2, in turns, in units of one plain backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.correctness import WITH, WITHOUT
from pcr_torch import PCR


@dataclass(frozen=True)
class Shape:
    """A model like Qwen2, and a microbatch."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv: int
    vocabulary: int
    responses: int
    tokens: int
    half: bool

    def model(self, device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv,
            tie_word_embeddings=False,
        )
        with device:
            model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        return model


SHAPES = {
    "documented, 8 x 512, float32": Shape(8, 512, 1536, 8, 4, 4096, 8, 512, half=False),
    "0.5B, 16 x 256, bf16 autocast": Shape(24, 896, 4864, 14, 2, 151936, 16, 256, half=True),
    "1.5B, 16 x 512, bf16 autocast": Shape(28, 1536, 8960, 12, 2, 151936, 16, 512, half=True),
}
TOYS = {
    "toy, 4 x 8": Shape(2, 32, 64, 2, 1, 64, 4, 8, half=False),
    "toy, 4 x 9, bf16": Shape(2, 40, 72, 2, 1, 64, 4, 9, half=True),
}


def updates(bench: Bench) -> None:
    """Ratios to vanilla of forward and backward passes with the update in .grad, in turns."""
    for name, shape in (TOYS if bench.toy else SHAPES).items():
        if bench.late:
            bench.add("updates", shape=name, left_out="no time left")
            continue
        try:
            _updates_of(bench, name, shape)
        except torch.OutOfMemoryError as error:
            bench.add("updates", shape=name, left_out=str(error).split(".")[0])
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _updates_of(bench: Bench, name: str, shape: Shape) -> None:
    model = shape.model(bench.device)
    n, length = shape.responses, shape.tokens
    tokens = torch.randint(shape.vocabulary, (n, length + 1), device=bench.device)
    p, s = torch.randn(2, n, length, device=bench.device)
    ids = torch.arange(n, device=bench.device) // 4

    def logp() -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=shape.half):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return torch.stack([-nn.functional.cross_entropy(row.float(), t, reduction="none")
                            for row, t in zip(logits, tokens[:, 1:], strict=True)])  # fmt: skip

    def vanilla() -> None:
        logp().backward(p + s)

    def two_passes() -> None:
        out = logp()
        out.backward(p, retain_graph=True)
        out.backward(s)

    upper = rf"layers\.({'|'.join(map(str, range(shape.layers // 2, shape.layers)))})\.mlp"
    ways: dict[str, dict[str, Any] | Callable[[], None]] = {
        "vanilla": vanilla,
        "two plain backward passes": two_passes,
        "PCR without noise": {"rule": WITHOUT, "noise_every": 0},
        "PCR with noise": {"rule": WITH},
        "PCR, upper half, without noise": {"rule": WITHOUT, "noise_every": 0, "blocks": upper},
        "PCR, upper half, with noise": {"rule": WITH, "blocks": upper},
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    memory: dict[str, int] = {}
    for turn in range(2 if bench.toy else 6):
        for way, options in ways.items():
            model.zero_grad(set_to_none=True)
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with _job(model, options, logp, (p, s), ids) as job:
                if turn == 1:
                    _count(bench, name, way, job)
                    model.zero_grad(set_to_none=True)
                seconds = bench.seconds(job)
            if turn:
                times[way].append(seconds)
            if bench.device.type == "cuda":
                memory[way] = torch.cuda.max_memory_allocated()
    unit = times["vanilla"]
    for way, each in times.items():
        ratios = [t / u for t, u in zip(each, unit, strict=True)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        found = {"ms": 1e3 * median(each), "ratio": median(ratios), "low": low, "high": high}
        bench.add("updates", shape=name, way=way, **found, **({"GB": memory[way] / 1e9} if memory else {}))


@contextmanager
def _job(model: nn.Module, options: Any, logp: Any, cotangents: Any, ids: Tensor) -> Iterator[Callable[[], None]]:
    if callable(options):
        yield options
        return
    method = PCR(model, **options)

    def job() -> None:
        method.accumulate_cotangents(logp(), *cotangents, group_ids=ids)
        method.resolve()

    yield job
    method.remove()


def _count(bench: Bench, name: str, way: str, job: Callable[[], None]) -> None:
    """Kernel launches, waits for the device and copies from the host."""
    if bench.device.type != "cuda":
        return
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        job()
        bench.wait()
    names = {event.key: event.count for event in record.key_averages()}

    def of(*words: str) -> int:
        return sum(count for key, count in names.items() if any(word in key for word in words))

    found = {"launches": of("LaunchKernel"), "waits": of("StreamSynchronize"), "from the host": of("Memcpy HtoD")}
    bench.add("counts", shape=name, way=way, **found)
