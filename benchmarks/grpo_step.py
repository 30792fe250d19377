"""What does PCR add to a GRPO update?

A Qwen2-like model (hidden 512, 8 layers, MLP 1536, vocabulary 4096), 16 responses of 128 tokens in groups of 4, one
micro-batch or several. Vanilla is one forward and one backward pass of the summed loss; all ways share the code of the
logits and of the objective, and end with the update in `.grad`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap
from transformers import Qwen2Config, Qwen2ForCausalLM

import pcr_core
import peers
from measure import Way, compare, keep_freed_memory, show
from pcr_torch import PCR

LAYERS, HIDDEN, MLP = 8, 512, 1536


class Problem:
    """The model, a batch of responses, and what the ways have in common."""

    def __init__(self, device: str, responses: int, tokens: int, vocabulary: int, micro_batches: int) -> None:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )
        self.model = Qwen2ForCausalLM(config).to(device)
        self.tokens = torch.randint(vocabulary, (responses, tokens + 1), device=device)
        self.group_ids = torch.arange(responses, device=device) // 4
        self.advantages = torch.randn(responses, device=device)
        self.noise = [0.1 * torch.randn(responses, tokens, device=device) for _ in range(2)]
        self.parameters = dict(self.model.named_parameters())
        self.blocks = [name for name in self.parameters if ".mlp." in name]
        size = responses // micro_batches
        self.parts = [slice(start, start + size) for start in range(0, responses, size)]

    def logp(self, rows: slice = slice(None)) -> Tensor:
        return _logp(self.model(input_ids=self.tokens[rows], use_cache=False).logits, self.tokens[rows])

    def cotangents(self, logp: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Of the rows, with the normalisation of the whole batch."""
        now = logp.detach()
        objective = pcr_core.grpo_objective(
            now,
            now + self.noise[0][rows],
            now + self.noise[1][rows],
            self.advantages[rows],
            torch.ones_like(now, dtype=torch.bool),
            beta=0.05,
        )
        share = logp.shape[0] / self.tokens.shape[0]
        return share * objective.plasticity_cotangent, share * objective.stability_cotangent


def _logp(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def ways(p: Problem) -> dict[str, Way]:
    """Every way by the name it has in the table."""

    def vanilla() -> None:
        for rows in p.parts:
            logp = p.logp(rows)
            plasticity, stability = p.cotangents(logp, rows)
            logp.backward(plasticity + stability)

    def two_passes() -> None:
        leaves = list(p.parameters.values())
        for rows in p.parts:
            logp = p.logp(rows)
            plasticity, stability = p.cotangents(logp, rows)
            one = torch.autograd.grad(logp, leaves, plasticity, retain_graph=True)
            for leaf, first, second in zip(leaves, one, torch.autograd.grad(logp, leaves, stability), strict=True):
                both = first.add_(second)
                leaf.grad = both if leaf.grad is None else leaf.grad.add_(both)

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
                return _logp(out.logits, row[None])[0]

            pull = vjp(forward, weights)[1]
            return pull(a)[0], pull(b)[0]

        one, two = vmap(of_one)(p.tokens, *cotangents)
        for name, leaf in p.parameters.items():
            if name in p.blocks:
                (one[name] ** 2).flatten(1).sum(1), (two[name] ** 2).flatten(1).sum(1)
                (one[name] * two[name]).flatten(1).sum(1)
            leaf.grad = one[name].sum(0) + two[name].sum(0)

    def pcr(**options: object) -> Way:
        @contextmanager
        def bound() -> Iterator[Callable[[], None]]:
            method = PCR(p.model, **options)  # type: ignore[arg-type]

            def job() -> None:
                for rows in p.parts:
                    logp = p.logp(rows)
                    method.accumulate_cotangents(logp, *p.cotangents(logp, rows), group_ids=p.group_ids[rows])
                method.resolve()

            yield _cleared(p, job)
            method.remove()

        return bound

    upper = rf"layers\.({'|'.join(str(i) for i in range(LAYERS // 2, LAYERS))})\.mlp"
    return {
        "vanilla: one backward pass": _plain(p, vanilla),
        "two backward passes, no norms": _plain(p, two_passes),
        "PCR, all MLP weights": pcr(),
        "PCR, MLP weights of the upper half, streams merged below": pcr(blocks=upper),
        "loop over responses": _plain(p, loop),
        "torch.func vmap": _plain(p, vectorised),
    }


def amortised_ways(p: Problem) -> dict[str, Way]:
    """Four updates of the MLP weights alone, as one block, so that one pair of weights serves all that is trained."""
    for name, leaf in p.parameters.items():
        leaf.requires_grad_(name in p.blocks)

    def vanilla() -> None:
        for _ in range(4):
            logp = p.logp()
            logp.backward(sum(p.cotangents(logp)))
            p.model.zero_grad(set_to_none=True)

    def pcr(every: int) -> Way:
        @contextmanager
        def bound() -> Iterator[Callable[[], None]]:
            method = PCR(p.model, granularity="global", every=every)

            def job() -> None:
                for _ in range(4):
                    logp = p.logp()
                    method.accumulate_cotangents(logp, *p.cotangents(logp), group_ids=p.group_ids)
                    method.resolve()
                    p.model.zero_grad(set_to_none=True)

            yield job
            method.remove()

        return bound

    return {"4 x vanilla": _plain(p, vanilla), "4 x PCR": pcr(1), "4 x PCR, every=4": pcr(4)}


def _plain(p: Problem, job: Callable[[], None]) -> Way:
    @contextmanager
    def bound() -> Iterator[Callable[[], None]]:
        yield _cleared(p, job)

    return bound


def _cleared(p: Problem, job: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        p.model.zero_grad(set_to_none=True)
        job()

    return run


def _chosen(names: Iterable[str], only: list[str] | None) -> list[str]:
    """The first, and those that contain one of the words."""
    return [name for k, name in enumerate(names) if k == 0 or only is None or any(word in name for word in only)]


def _in_jax(args: argparse.Namespace) -> None:
    if args.amortised:
        raise SystemExit("--amortised: every=K is not in pcr_jax")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before JAX starts its threads
    import jax_step

    programs = jax_step.programs(args.responses, args.tokens, args.vocabulary, args.groups_at_once)
    rows = jax_step.compare({name: programs[name] for name in _chosen(programs, args.only)}, args.repeats)
    show(
        f"A GRPO update of {args.responses} responses x {args.tokens} tokens, {args.groups_at_once} groups at once; "
        "memory is XLA's temporary memory",
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
