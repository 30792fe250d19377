"""Inner products, and weighted sums in place, of many pairs of long vectors: one launch for all of a dtype.

Addresses, lengths and which program serves which pair go to the device in one table. Each program reads some blocks of
2048 numbers of a pair once; sums are float32 within a block and float64 from there on.
"""

# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pcr_torch.kernels.triton_scale import three_products

_BLOCK = 2048
_BLOCKS = 16  # a program
_WARPS = 8
_ALIGNED = 16  # bytes of an address, for wide loads
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["pairs"])
def _products(
    table_at,  # int64: addresses of firsts, of seconds, lengths, first programs (pairs each); pairs (programs)
    found_at,  # (programs, 3)
    pairs,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    JOINED: tl.constexpr,  # 0 or 1: that one holds the sum of both; 2: neither does
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    program = tl.program_id(0)
    pair = tl.load(table_at + 4 * pairs + program)
    p_at = tl.load(table_at + pair).to(tl.pointer_type(FIRST))
    s_at = tl.load(table_at + pairs + pair).to(tl.pointer_type(SECOND))
    if ALIGNED:
        p_at = tl.multiple_of(p_at, 16)
        s_at = tl.multiple_of(s_at, 16)
    end = tl.load(table_at + 2 * pairs + pair)
    start = (program - tl.load(table_at + 3 * pairs + pair)) * (BLOCK * BLOCKS)
    pp = tl.full((), 0.0, tl.float64)
    ss = tl.full((), 0.0, tl.float64)
    ps = tl.full((), 0.0, tl.float64)
    for block in range(BLOCKS):
        at = start + block * BLOCK + tl.arange(0, BLOCK)
        p = tl.load(p_at + at, mask=at < end, other=0.0).to(tl.float32)
        s = tl.load(s_at + at, mask=at < end, other=0.0).to(tl.float32)
        if JOINED == 0:
            p = p - s
        if JOINED == 1:
            s = s - p
        more_pp, more_ss, more_ps = three_products(p, s)
        pp += more_pp
        ss += more_ss
        ps += more_ps
    tl.store(found_at + 3 * program, pp)
    tl.store(found_at + 3 * program + 1, ss)
    tl.store(found_at + 3 * program + 2, ps)


@triton.jit
def _breaks(t):
    """1 where it is not finite, else 0."""
    return tl.where(tl.abs(t) < float("inf"), 0, 1)


@triton.jit(do_not_specialize=["pairs"])
def _combine(
    table_at,  # as above, with addresses of the outputs, and whether to add to them, before the last
    weights_at,  # (2, pairs)
    broken_at,  # (pairs,)
    pairs,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    OUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    program = tl.program_id(0)
    pair = tl.load(table_at + 6 * pairs + program)
    p_at = tl.load(table_at + pair).to(tl.pointer_type(FIRST))
    s_at = tl.load(table_at + pairs + pair).to(tl.pointer_type(SECOND))
    out_at = tl.load(table_at + 4 * pairs + pair).to(tl.pointer_type(OUT))
    if ALIGNED:
        p_at = tl.multiple_of(p_at, 16)
        s_at = tl.multiple_of(s_at, 16)
        out_at = tl.multiple_of(out_at, 16)
    end = tl.load(table_at + 2 * pairs + pair)
    start = (program - tl.load(table_at + 3 * pairs + pair)) * (BLOCK * BLOCKS)
    there = end * tl.load(table_at + 5 * pairs + pair)  # none where it is not added to
    a = tl.load(weights_at + pair)
    b = tl.load(weights_at + pairs + pair)
    broken = 0
    for block in range(BLOCKS):
        at = start + block * BLOCK + tl.arange(0, BLOCK)
        p = tl.load(p_at + at, mask=at < end, other=0.0).to(tl.float32)
        s = tl.load(s_at + at, mask=at < end, other=0.0).to(tl.float32)
        before = tl.load(out_at + at, mask=at < there, other=0.0).to(tl.float32)
        update = (a * p + b * s).to(OUT)
        after = (update.to(tl.float32) + before).to(OUT)
        tl.store(out_at + at, after, mask=at < end)
        broke = _breaks(update.to(tl.float32)) + _breaks(after.to(tl.float32)) * (1 - _breaks(before))
        broken = tl.maximum(broken, tl.max(broke))
    if broken != 0:
        tl.store(broken_at + pair, 1)


def pair_products(firsts: Sequence[Tensor], seconds: Sequence[Tensor], *, joined: int | None = None) -> Tensor:
    """(pairs, 3) float64 |p|^2, |s|^2 and <p, s> of dense tensors: all firsts of one dtype, all seconds of one.

    With `joined`, the firsts (0) or the seconds (1) hold p + s in place of p or s.
    """
    device = firsts[0].device
    sizes = np.array([t.numel() for t in firsts])
    programs = -(-sizes // (_BLOCK * _BLOCKS))
    table, aligned = _table([firsts, seconds], sizes, programs, [], device)
    found = torch.empty((int(programs.sum()), 3), dtype=torch.float64, device=device)
    with torch.cuda.device_of(table):  # a launch goes to the current device
        _products[(len(found),)](
            table,
            found,
            len(sizes),
            FIRST=DTYPES[firsts[0].dtype],
            SECOND=DTYPES[seconds[0].dtype],
            JOINED=2 if joined is None else joined,
            ALIGNED=aligned,
            BLOCK=_BLOCK,
            BLOCKS=_BLOCKS,
            num_warps=_WARPS,
        )
    lengths = torch.from_numpy(programs).to(device, non_blocking=True)
    return torch.segment_reduce(found, "sum", lengths=lengths, unsafe=True)


def combine(
    outs: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    weights: Tensor,
    adds: Sequence[bool],
) -> Tensor:
    """outs = weights[0] * firsts + weights[1] * seconds, or that added to what is there; (pairs,) whether some broke.

    A number breaks if it is not finite in the dtype of the output, or if its sum with a finite one there is not.

    Args:
        outs: dense, of one dtype; may be the firsts or the seconds.
        firsts: of one dtype.
        seconds: of one dtype.
        weights: (2, pairs) on the device.
        adds: whether each is added to what its output holds.
    """
    device = firsts[0].device
    sizes = np.array([t.numel() for t in firsts])
    programs = -(-sizes // (_BLOCK * _BLOCKS))
    more = [[t.data_ptr() for t in outs], list(map(int, adds))]
    table, aligned = _table([firsts, seconds], sizes, programs, more, device)
    broken = torch.zeros(len(sizes), dtype=torch.int32, device=device)
    with torch.cuda.device_of(table):  # a launch goes to the current device
        _combine[(int(programs.sum()),)](
            table,
            weights.float().contiguous(),
            broken,
            len(sizes),
            FIRST=DTYPES[firsts[0].dtype],
            SECOND=DTYPES[seconds[0].dtype],
            OUT=DTYPES[outs[0].dtype],
            ALIGNED=aligned and all(at % _ALIGNED == 0 for at in more[0]),
            BLOCK=_BLOCK,
            BLOCKS=_BLOCKS,
            num_warps=_WARPS,
        )
    return broken != 0


def _table(
    tensors: Sequence[Sequence[Tensor]],
    sizes: np.ndarray,
    programs: np.ndarray,
    more: Sequence[Sequence[int]],
    device: torch.device,
) -> tuple[Tensor, bool]:
    """The kernels' table, and whether all addresses are aligned."""
    addresses = [[t.data_ptr() for t in each] for each in tensors]
    pair = np.repeat(np.arange(len(sizes)), programs)
    parts = [*addresses, sizes, np.cumsum(programs) - programs, *more, pair]
    whole = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    aligned = all(at % _ALIGNED == 0 for each in addresses for at in each)
    return whole.to(device, non_blocking=True), aligned
