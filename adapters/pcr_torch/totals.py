"""Both streams' gradients by ordinary automatic differentiation, for rules that need no noise.

Two backward passes over the graph of the log-probabilities: one of a single stream, which forms the gradients of the
block parameters alone, and an ordinary one of the streams' sum. The sum's gradient T is that of a plain backward pass
to the last bit. The other stream's gradient is T less the first's, which is never written to memory: `combine.py` turns
a P + b S into a T + (b - a) S. The single stream is the smaller one, so that the difference keeps the other's digits.
The only requirement on the model is that autograd can run a backward pass of its graph twice.

The passes alternate over segments of the graph (`graph/segments.py`), so that memory is freed as in one pass. Between
the log-probabilities and the topmost block, one pass of the sum gives both streams as far as each row of an activation
belongs to one token (`graph/rows.py`). Below the lowest block there is the pass of the sum alone.

Where autograd cannot be asked for the gradients of chosen parameters (sharded weights, reentrant checkpointing), or
where a hook may change a stream, two whole passes give P and S.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pcr_torch.distributed import kept_whole, local
from pcr_torch.graph.rows import row_shares, share_of
from pcr_torch.graph.segments import Segment, back, back_for, segments
from pcr_torch.pullback import Total, add_total, total_dtype

Pass: TypeAlias = Literal["single", "sum"]


def pull_totals(
    logp: Tensor,
    cotangents: Sequence[Tensor],
    parameters: Mapping[str, nn.Parameter],
    totals: Sequence[Total],
    *,
    joined: int | None = None,
    fresh: bool = True,
    fsdp: Sequence[FSDPModule] = (),
) -> int | None:
    """Backward passes over logp's graph, which is freed; gradients of other parameters are added to their .grad.

    Args:
        logp: (n, T) with its graph.
        cotangents: one or two of shape (n, T).
        parameters: the block parameters by name; their .grad is left as it was.
        totals: of each stream, to which its gradients are added; those of a parameter that was not used stay absent.
        joined: index of the stream in whose place the totals hold the sum's gradients; None where they hold P and S.
        fresh: whether the totals are empty, and it may be chosen what they hold.
        fsdp: the model's sharded modules.

    Returns:
        `joined` as it is from now on.
    """
    with _set_aside(parameters):
        names = {id(parameter): name for name, parameter in parameters.items()}
        hooked = any(parameter._backward_hooks for parameter in parameters.values())
        may_join = len(cotangents) == 2 and (fresh or joined is not None) and not (fsdp or hooked)
        chain = segments(logp, names.keys()) if may_join else None
        if chain is not None:
            single = 1 - larger(cotangents)
            same = joined in (None, 1 - single)
            whole: Total = totals[1 - single] if same else {}
            with _adding(parameters, whole):
                found = sum_and_single(chain, logp, cotangents, single)
            alone = {names[id(leaf)]: g.to(total_dtype(leaf)) for leaf, g in found}
            if same:
                _add(totals[single], alone)
                return 1 - single
            # the totals have the other stream alone: of this microbatch that is the larger, which is a difference
            _add(
                totals[1 - single], {name: g - alone[name] if name in alone else g.clone() for name, g in whole.items()}
            )
            _add(totals[single], whole)
            return joined
        part(totals, joined)
        for k, cotangent in enumerate(cotangents):
            again = k + 1 < len(cotangents)
            with _adding(parameters, totals[k]), kept_whole(fsdp if again else ()):
                torch.autograd.backward(logp, cotangent, retain_graph=again)
        return None


def _add(total: Total, parts: Total) -> None:
    for name, gradient in parts.items():
        add_total(total, name, gradient)


def part(totals: Sequence[Total], joined: int | None) -> None:
    """P and S in the totals, where the sum is in the place of one of them."""
    if joined is not None:
        for name, single in totals[1 - joined].items():
            totals[joined][name].sub_(single)


def larger(cotangents: Sequence[Tensor]) -> int:
    """Index of the stream that is left to a difference; waits for an accelerator.

    The first where it is zero: a microbatch whose rewards are all equal says nothing of the next ones.
    """
    first, second = (torch.linalg.vector_norm(cotangent, dtype=total_dtype(cotangent)) for cotangent in cotangents)
    return int((first > 0) & (second > first))


def sum_and_single(
    chain: Sequence[Segment],
    logp: Tensor,
    cotangents: Sequence[Tensor],
    single: int,
    turn: Callable[[Pass], None] = lambda _: None,
) -> list[tuple[Tensor, Tensor]]:
    """Backward passes of the streams' sum and of one stream alone, segment by segment.

    Args:
        chain: `segments(logp, leaves)`.
        logp: (n, T) with its graph, which is freed.
        cotangents: two of shape (n, T).
        single: index of the stream that goes alone.
        turn: told of each pass before it begins.

    Returns:
        The leaves with the single stream's gradient of each; the sum's are added to .grad of all that is trained.
    """
    found: list[tuple[Tensor, Tensor]] = []
    lowest = max((k for k, segment in enumerate(chain) if segment.tensors), default=-1)
    total, stream = [cotangents[0] + cotangents[1]], [cotangents[single]]
    # a hook on logp may make anything of a cotangent
    shares = row_shares(cotangents) if chain[0].below and lowest >= 0 and not logp._backward_hooks else None
    for k, segment in enumerate(chain):
        if k <= lowest and (k > 0 or shares is None):
            turn("single")
            gradients, stream = back_for(segment, logp, stream, onward=k < lowest)
            found += [(leaf, g) for leaf, g in zip(segment.tensors, gradients, strict=True) if g is not None]
        turn("sum")
        total = back(segment, logp, total)
        if k == 0 and shares is not None:
            stream = [share_of(g, shares[single][rows]) for g, rows in zip(total, segment.below, strict=True)]
    return found


@contextmanager
def _set_aside(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Without the gradients that are there, which are put back."""
    before = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.grad = before[name]


@contextmanager
def _adding(parameters: Mapping[str, nn.Parameter], total: Total) -> Iterator[None]:
    """What a backward pass adds to .grad is added to a total: in its memory, where that can be a .grad."""
    for name, parameter in parameters.items():
        whole = name in total and total[name].dtype == parameter.dtype and not isinstance(parameter, DTensor)
        parameter.grad = total.pop(name) if whole else None
    yield
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            add_total(total, name, local(parameter.grad).to(total_dtype(parameter)))
        parameter.grad = None
