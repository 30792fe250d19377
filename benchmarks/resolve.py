"""What does it cost to resolve two ready gradients?

One block of d = 5e7 float32 numbers, in units of one copy of d. PCR takes the three inner products, decides, and writes
a P + b S in place; the others are TorchJD's PCGrad aggregator and the common PyTorch-PCGrad loop (flatten, project,
unflatten) on the same two gradients. Prints the error of the inner products against float64 as well.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

import pcr_core
from measure import Row, Way, compare, keep_freed_memory, rows_of, show
from pcr_core import BlockStatistics
from pcr_torch.combine import add_combination, gradient_products

COSINE = -0.1


def gradients(d: int, device: str, cosine: float) -> tuple[Tensor, Tensor]:
    """Two of d numbers, the second 30 times smaller, with this cosine up to sampling."""
    generator = torch.Generator(device).manual_seed(0)
    p, noise = (torch.randn(d, generator=generator, device=device) for _ in range(2))
    return p, noise.mul_((1 - cosine**2) ** 0.5).add_(p, alpha=cosine).mul_(1 / 30)


def pcr(parameter: torch.nn.Parameter, p: Tensor, s: Tensor) -> None:
    """What PCR.resolve does for a block of one parameter on one process."""
    pp, ss, ps = (x[None].cpu() for x in gradient_products(p, s))
    one = torch.ones(1, dtype=torch.float64)
    weights = pcr_core.PCR(alpha="variance")(BlockStatistics(pp, ss, ps, 0.5 * pp, 0.5 * ss, 0 * one, p.numel() * one))
    add_combination(parameter, p, s, weights.plasticity.item(), weights.stability.item())


def pcgrad_loop(parameter: torch.nn.Parameter, p: Tensor, s: Tensor) -> None:
    """The common implementation of PCGrad for two tasks: copies, and projects each on the other."""
    flat = [p.flatten(), s.flatten()]
    projected = [g.clone() for g in flat]
    for i, mine in enumerate(projected):
        other = flat[1 - i]
        dot = torch.dot(mine, other)
        if dot < 0:
            mine -= dot * other / (other.norm() ** 2)
    parameter.grad = torch.stack(projected).sum(dim=0).view_as(parameter)


def torchjd(parameter: torch.nn.Parameter, p: Tensor, s: Tensor) -> None:
    from torchjd.aggregation import PCGrad

    parameter.grad = PCGrad()(torch.stack([p, s]))


def _way(job: Callable[[torch.nn.Parameter, Tensor, Tensor], None], p: Tensor, s: Tensor) -> Way:
    @contextmanager
    def bound() -> Iterator[Callable[[], None]]:
        parameter = torch.nn.Parameter(torch.empty_like(p), requires_grad=True)
        mine, other = p.clone(), s.clone()

        def run() -> None:
            parameter.grad = None
            job(parameter, mine, other)

        yield run

    return bound


def _copy(p: Tensor) -> Way:
    @contextmanager
    def bound() -> Iterator[Callable[[], None]]:
        target = torch.zeros_like(p)

        def run() -> None:
            target.copy_(p)

        yield run

    return bound


def in_jax(size: int, repeats: int) -> list[Row]:
    """A copy between two arrays that are there, and `pcr_jax.resolve` compiled, P donated.

    JAX's arrays lie in ordinary pages; NumPy asks for huge ones, in which copying is faster. The unit is a copy between
    arrays like those that are resolved, so JAX's; NumPy's has a row of its own.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import pcr_jax

    p, s = (np.array(x) for x in gradients(size, "cpu", COSINE))
    target = np.zeros_like(p)
    noise = pcr_core.Scatter(*(jnp.ones(1) for _ in range(3)))

    def resolve(p: object, s: object) -> object:
        return pcr_jax.resolve({"w": p}, {"w": s}, noise, pcr_core.PCR(alpha="variance"), blocks="all")

    program = jax.jit(resolve, donate_argnums=(0,))
    other = jnp.asarray(s)
    held = jax.jit(jnp.negative)(p)  # memory of JAX's own: that of a NumPy array cannot be donated
    copied = [jax.block_until_ready(jax.jit(jnp.negative)(x)) for x in (p, s)]
    source, into = (x.unsafe_buffer_pointer() for x in copied)
    copies = {
        "copy of d": lambda: ctypes.memmove(into, source, p.nbytes),
        "copy of d in NumPy's memory": lambda: np.copyto(target, p),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*copies, "PCR, compiled")}
    for _ in track(range(repeats), "timing", transient=True):
        for name, copy in copies.items():
            for _ in range(2):  # the second is measured, after nothing but its like
                start = time.perf_counter()
                copy()
                took = time.perf_counter() - start
            seconds[name].append(took)
        for _ in range(2):
            start = time.perf_counter()
            update, report = jax.block_until_ready(program(held, other))
            resolved = time.perf_counter() - start
            held = update["w"]
        seconds["PCR, compiled"].append(resolved)
    assert bool(report.weights.finite.all())
    temporary = jax.jit(resolve, donate_argnums=(0,)).lower(jnp.asarray(p), other).compile().memory_analysis()
    size = 2 * p.nbytes
    return rows_of(seconds, dict.fromkeys(copies, size) | {"PCR, compiled": size + temporary.temp_size_in_bytes})


def errors(device: str, d: int) -> None:
    """Relative errors of the three inner products, ordinary and nearly orthogonal."""
    print("| cosine | \\|P\\|^2 | \\|S\\|^2 | P.S | P.S over \\|P\\|\\|S\\| |\n|---|---|---|---|---|")
    for cosine in (COSINE, -1e-3, 0.0):
        p, s = gradients(d, device, cosine)
        found = gradient_products(p, s).cpu()
        exact = [sum((a.double() @ b.double()).item() for a, b in zip(x.split(1 << 22), y.split(1 << 22)))
                 for x, y in ((p, p), (s, s), (p, s))]  # fmt: skip
        relative = [abs(f.item() - e) / abs(e) for f, e in zip(found, exact, strict=True)]
        scaled = abs(found[2].item() - exact[2]) / (exact[0] * exact[1]) ** 0.5
        print(f"| {cosine:g} | " + " | ".join(f"{e:.1e}" for e in [*relative, scaled]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of PyTorch")
    parser.add_argument("--size", type=int, default=50_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-freed-memory", action="store_true", help="no page faults (glibc)")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    args = parser.parse_args()
    title = f"Resolving two gradients of {args.size:.0e} float32 numbers"
    if args.framework == "jax":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before JAX starts its threads
        show(title, in_jax(args.size, args.repeats), "jax", args.json)
        return
    torch.set_num_threads(args.threads)
    if args.keep_freed_memory:
        keep_freed_memory()
    p, s = gradients(args.size, args.device, COSINE)
    ways = {
        "copy of d": _copy(p),
        "PCR": _way(pcr, p, s),
        "PCR, nearly orthogonal gradients": _way(pcr, *gradients(args.size, args.device, 0.0)),
        "PCGrad, the common loop": _way(pcgrad_loop, p, s),
    }
    if find_spec("torchjd") is not None:
        ways["PCGrad, TorchJD"] = _way(torchjd, p, s)
    else:
        print("TorchJD is not installed (pip install torchjd): its row is left out\n")
    rows = compare(ways, repeats=args.repeats, device=args.device, held=8 * args.size)
    show(title, rows, args.device, args.json)
    print()
    errors(args.device, args.size)


if __name__ == "__main__":
    main()
