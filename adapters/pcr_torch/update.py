"""Adding a P + b S to every `.grad`: one after the other on a CPU, in few launches and one wait on an accelerator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pcr_torch import kernels
from pcr_torch.combine import add_combination, is_held
from pcr_torch.distributed import like, local

_BUCKET = 1 << 28  # numbers of a launch; what was read is freed after it


class Part(NamedTuple):
    """Arguments of `combine.add_combination`."""

    parameter: nn.Parameter
    plasticity: Tensor | None
    stability: Tensor | None
    a: float
    b: float
    bound: float


def add_update(parts: Iterable[Part]) -> list[bool]:
    """`add_combination` of every part, in order; an iterator that keeps no part itself lets memory go early."""
    held: list[bool] = []
    unread: list[tuple[list[int], Tensor]] = []
    for device, same in groupby(enumerate(parts), key=lambda each: local(each[1].parameter).device):
        if not kernels.serve(device):
            held.extend(add_combination(*part) for _, part in same)
            continue
        for bucket in _buckets(same):
            held.extend(True for _ in bucket)
            used = {k: part for k, part in bucket if part.plasticity is not None or part.stability is not None}
            broken = _add_together(list(used.values()), device) if used else None
            if broken is not None:
                unread.append((list(used), broken))
    if unread:
        flags = torch.cat([broken.cpu() for _, broken in unread]).tolist()
        for k, broke in zip((k for at, _ in unread for k in at), flags, strict=True):
            held[k] = not broke
    return held


def _buckets(parts: Iterable[tuple[int, Part]]) -> Iterator[list[tuple[int, Part]]]:
    bucket: list[tuple[int, Part]] = []
    numbers = 0
    for k, part in parts:
        bucket.append((k, part))
        numbers += local(part.parameter).numel()
        if numbers > _BUCKET:
            yield bucket
            bucket, numbers = [], 0
    yield bucket


def _add_together(parts: Sequence[Part], device: torch.device) -> Tensor | None:
    """Of which some number broke, on the device; None where bounds say that none can."""
    outs, firsts, seconds, weights = [], [], [], []
    for parameter, p, s, a, b, _ in parts:
        first = s if p is None else p
        assert first is not None
        firsts.append(first)
        seconds.append(first if p is None or s is None else s)
        # what is absent adds nothing, unless its weight is not finite, which is to be seen
        weights.append((b, 0.0) if p is None else (a, 0.0 if s is None and math.isfinite(b) else b))
        if parameter.grad is not None:
            outs.append(local(parameter.grad))
        else:
            outs.append(first if first.dtype == parameter.dtype else torch.empty_like(first, dtype=parameter.dtype))
    table = torch.tensor(weights, dtype=torch.float32).T.contiguous().to(device, non_blocking=True)
    broken = kernels.combine(outs, firsts, seconds, table, [part.parameter.grad is not None for part in parts])
    for (parameter, *_), out in zip(parts, outs, strict=True):
        if parameter.grad is None:
            parameter.grad = like(out, parameter)
    return None if all(is_held(part.parameter, part.bound) for part in parts) else broken
