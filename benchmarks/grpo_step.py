"""What does PCR add to a GRPO update?

A Qwen2-like model (hidden 512, 8 layers, MLP 1536, vocabulary 4096), 16 responses of 128 tokens in groups of 4, one
micro-batch or several. Vanilla is one forward and one backward pass of the summed loss; all ways share the code of the
logits and of the objective, and end with the update in `.grad`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

import peers
from measure import compare, keep_freed_memory, show
from update import Problem, Way, pcr, plain, token_logp, two_passes, vanilla


def ways(p: Problem) -> dict[str, Way]:
    """Every way by the name it has in the table."""

    def loop() -> None:
        """Micro-batches of one response: what one writes first."""
        leaves = list(p.parameters.values())
        totals: list[Tensor | None] = [None] * len(leaves)
        for i in range(p.tokens.shape[0]):
            logp = p.logp(slice(i, i + 1))
            cotangents = p.cotangents(logp, slice(i, i + 1))
            one = torch.autograd.grad(logp, leaves, cotangents[0], retain_graph=True)
            two = torch.autograd.grad(logp, leaves, cotangents[1])
            for k, (name, a, b) in enumerate(zip(p.parameters, one, two, strict=True)):
                if name in p.blocks:
                    (a * a).sum(), (b * b).sum(), (a * b).sum()
                both = a + b
                totals[k] = both if totals[k] is None else totals[k].add_(both)
        for leaf, total in zip(leaves, totals, strict=True):
            leaf.grad = total

    def vectorised() -> None:
        """torch.func: vmap over responses of both pullbacks; gradients of every response at once."""
        logp_now = p.logp().detach()
        cotangents = p.cotangents(logp_now)
        weights = {name: leaf.detach() for name, leaf in p.parameters.items()}

        def of_one(row: Tensor, a: Tensor, b: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            def forward(values: dict[str, Tensor]) -> Tensor:
                out = functional_call(p.model, values, (), {"input_ids": row[None], "use_cache": False})
                return token_logp(out.logits, row[None])[0]

            pull = vjp(forward, weights)[1]
            return pull(a)[0], pull(b)[0]

        one, two = vmap(of_one)(p.tokens, *cotangents)
        for name, leaf in p.parameters.items():
            if name in p.blocks:
                (one[name] ** 2).flatten(1).sum(1), (two[name] ** 2).flatten(1).sum(1)
                (one[name] * two[name]).flatten(1).sum(1)
            leaf.grad = one[name].sum(0) + two[name].sum(0)

    return {
        "vanilla: one backward pass": vanilla(p),
        "two backward passes, no norms": two_passes(p),
        "PCR, all MLP weights": pcr(p, noise_every=1),
        "PCR, MLP weights of the upper half, streams merged below": pcr(p, blocks=p.upper, noise_every=1),
        "PCR without noise, all MLP weights": pcr(p, noise_every=0),
        "PCR without noise, the upper half": pcr(p, blocks=p.upper, noise_every=0),
        "loop over responses": plain(p, loop),
        "torch.func vmap": plain(p, vectorised),
    }


def amortised_ways(p: Problem) -> dict[str, Way]:
    """Four updates of the MLP weights alone, as one block, so that one pair of weights serves all that is trained."""
    for name, leaf in p.parameters.items():
        leaf.requires_grad_(name in p.blocks)

    def vanilla_updates() -> None:
        for _ in range(4):
            logp = p.logp()
            logp.backward(sum(p.cotangents(logp)))
            p.model.zero_grad(set_to_none=True)

    found = {"4 x vanilla": plain(p, vanilla_updates)}
    for name, every in (("4 x PCR", 1), ("4 x PCR, every=4", 4)):
        found[name] = pcr(p, updates=4, granularity="global", every=every)
    return found


def _chosen(names: Iterable[str], only: list[str] | None) -> list[str]:
    """The first, and those that contain one of the words."""
    return [name for k, name in enumerate(names) if k == 0 or only is None or any(word in name for word in only)]


def _in_jax(args: argparse.Namespace) -> None:
    if args.amortised:
        raise SystemExit("--amortised: every=K is not in pcr_jax")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before JAX starts its threads
    import jax_step

    size = jax_step.Size(args.layers, args.hidden, args.mlp)
    sizes = args.responses, args.tokens, args.vocabulary, args.groups_at_once
    programs = jax_step.programs(size, *sizes, stacked=args.stacked)
    chosen = {name: programs[name] for name in _chosen(programs, args.only)}
    rows = (jax_step.compile_times if args.compile_time else jax_step.compare)(chosen, args.repeats)
    what = "Compiling a" if args.compile_time else "A"
    how = f"{size}, {'one stack of layers, ' if args.stacked else ''}{args.groups_at_once} groups at once"
    batch = f"{args.responses} responses x {args.tokens} tokens"
    show(
        f"{what} GRPO update of {batch}, {how}; memory is XLA's temporary memory",
        rows,
        "jax",
        args.json,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of PyTorch")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; each measures every way once")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; of JAX, cores")
    parser.add_argument("--groups-at-once", type=int, default=4, help="of JAX: groups in a forward pass")
    parser.add_argument("--layers", type=int, default=8, help="of JAX, as the next three")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--mlp", type=int, default=1536)
    parser.add_argument("--stacked", action="store_true", help="layers in one array, which a scan goes through")
    parser.add_argument(
        "--compile-time", action="store_true", help="of JAX: what it takes to trace and compile instead"
    )
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument(
        "--micro-batches", type=int, default=1, help="of PyTorch; more than 1 leaves other libraries out"
    )
    parser.add_argument("--amortised", action="store_true", help="four updates with every=4 in place of the table")
    parser.add_argument("--only", nargs="*", help="ways whose name contains one of these, besides vanilla")
    parser.add_argument("--keep-freed-memory", action="store_true", help="no page faults (glibc); so always in JAX")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    args = parser.parse_args()
    if args.micro_batches < 1 or args.responses % (4 * args.micro_batches):
        parser.error("--micro-batches: groups of 4 responses have to stay whole")
    if args.micro_batches > 1 and (args.framework == "jax" or args.amortised):
        parser.error("--micro-batches: of JAX see --groups-at-once; --amortised has one micro-batch in a step")
    if args.keep_freed_memory or args.framework == "jax":
        keep_freed_memory()
    if args.framework == "jax":
        _in_jax(args)
        return
    torch.set_num_threads(args.threads)
    make = partial(Problem, args.device, args.responses, args.tokens, args.vocabulary, args.micro_batches)
    problem = make()
    every = amortised_ways(problem) if args.amortised else ways(problem)
    if args.micro_batches > 1:
        del every["torch.func vmap"]
    elif not args.amortised:
        every |= peers.ways(make)
    chosen = {name: every[name] for name in _chosen(every, args.only)}
    held = sum(leaf.numel() * leaf.element_size() for leaf in problem.parameters.values())
    rows = compare(chosen, repeats=args.repeats, device=args.device, held=held)
    title = f"A GRPO update of {args.responses} responses x {args.tokens} tokens, vocabulary {args.vocabulary}"
    title += f", micro-batches: {args.micro_batches}" * (args.micro_batches > 1)
    show(title, rows, args.device, args.json)


if __name__ == "__main__":
    main()
