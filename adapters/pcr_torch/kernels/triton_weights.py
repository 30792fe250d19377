"""Gradient of a linear layer's weight and its inner products in one pass; per-response gradients stay in registers.

One program forms one tile of the weight: over the strata, over the responses of each, over the rows of each. Two
accumulators a stream live at a time besides the response's own: of the stratum and of all. At a response's end its
products go to a (pairs, responses + strata, tiles) buffer, which is summed over tiles in float64 afterwards.
Loops are nested and not flattened into one with a conditional end, which was 10 times slower on an H100.
"""

# mypy: ignore-errors
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcr_torch.kernels.layout import Layout
from pcr_torch.kernels.triton_scale import square, three_products

_MANY = 512  # rows of a response from which wide tiles pay
_GROUP = 8  # tiles of a column that run side by side share what they read of the activations


@dataclass(frozen=True)
class Tiles:
    """Sizes of a program's tile (outputs, inputs), of the rows that it multiplies at once, and how it runs.

    Attributes:
        precision: of float32 products, as in `triton.language.dot`: "ieee", "tf32x3" or "tf32".
    """

    outputs: int
    inputs: int
    rows: int
    warps: int
    stages: int = 3
    precision: str = "ieee"


def tiles_for(rows: float, inputs: int, outputs: int, dtype: torch.dtype) -> Tiles:
    """Measured on an H100; `rows` is the mean of the responses'."""
    depth = 32 if dtype == torch.float32 else 64
    if rows < _MANY:
        return Tiles(64, 64, depth, warps=4)
    # of two streams' output gradients a program reads twice as many numbers as of activations, so that side is short
    wide, tall = (triton.cdiv(outputs, o) * triton.cdiv(inputs, i) for o, i in ((64, 128), (128, 64)))
    return Tiles(64, 128, depth, warps=8) if wide <= tall else Tiles(128, 64, depth, warps=8)


@triton.jit(do_not_specialize=["responses", "strata", "tiles"])
def _kernel(
    x_at,
    a_at,
    b_at,  # (rows, inputs), (rows, outputs) of either stream
    rows_at,
    starts_at,
    ends_at,
    responses_at,
    bounds_at,  # see Layout
    p_at,
    s_at,  # totals of either stream
    found_at,  # (pairs, responses + strata, tiles)
    responses,
    strata,
    tiles,
    inputs,
    outputs,
    x_stride,
    a_stride,
    b_stride,
    STREAMS: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # Triton's interpreter multiplies bfloat16 as if it were integers
):
    pid = tl.program_id(0)
    across = tl.cdiv(inputs, IN)
    down = tl.cdiv(outputs, OUT)
    first = pid // (GROUP * across) * GROUP
    high = tl.minimum(down - first, GROUP)
    within = pid % (GROUP * across)
    o = (first + within % high) * OUT + tl.arange(0, OUT)
    i = within // high * IN + tl.arange(0, IN)
    k = tl.arange(0, ROWS)
    o_held = o < outputs
    i_held = i < inputs
    HEIGHT: tl.constexpr = IN if TRANSPOSED else OUT
    WIDTH: tl.constexpr = OUT if TRANSPOSED else IN
    pair = (responses + strata) * tiles
    total_a = tl.zeros((HEIGHT, WIDTH), tl.float32)
    if STREAMS == 2:
        total_b = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for stratum in range(strata):
        sum_a = tl.zeros((HEIGHT, WIDTH), tl.float32)
        if STREAMS == 2:
            sum_b = tl.zeros((HEIGHT, WIDTH), tl.float32)
        for place in range(tl.load(bounds_at + stratum), tl.load(bounds_at + stratum + 1)):
            one_a = tl.zeros((HEIGHT, WIDTH), tl.float32)
            if STREAMS == 2:
                one_b = tl.zeros((HEIGHT, WIDTH), tl.float32)
            end = tl.load(ends_at + place)
            for start in range(tl.load(starts_at + place), end, ROWS):
                row = start + k
                row_held = row < end
                if GATHER:
                    row = tl.load(rows_at + row, mask=row_held, other=0)
                row = row.to(tl.int64)[:, None]
                x_held = row_held[:, None] & i_held[None, :]
                d_held = row_held[:, None] & o_held[None, :]
                x = tl.load(x_at + row * x_stride + i[None, :], mask=x_held, other=0.0)
                a = tl.load(a_at + row * a_stride + o[None, :], mask=d_held, other=0.0)
                if WIDEN:
                    x = x.to(tl.float32)
                    a = a.to(tl.float32)
                if TRANSPOSED:
                    one_a = tl.dot(tl.trans(x), a, one_a, input_precision=PRECISION)
                else:
                    one_a = tl.dot(tl.trans(a), x, one_a, input_precision=PRECISION)
                if STREAMS == 2:
                    b = tl.load(b_at + row * b_stride + o[None, :], mask=d_held, other=0.0)
                    if WIDEN:
                        b = b.to(tl.float32)
                    if TRANSPOSED:
                        one_b = tl.dot(tl.trans(x), b, one_b, input_precision=PRECISION)
                    else:
                        one_b = tl.dot(tl.trans(b), x, one_b, input_precision=PRECISION)
            at = found_at + tl.load(responses_at + place).to(tl.int64) * tiles + pid
            if STREAMS == 2:
                aa, bb, ab = three_products(one_a, one_b)
                tl.store(at, aa)
                tl.store(at + pair, bb)
                tl.store(at + 2 * pair, ab)
                sum_b += one_b
            else:
                tl.store(at, square(one_a))
            sum_a += one_a
        at = found_at + (responses + stratum).to(tl.int64) * tiles + pid
        if STREAMS == 2:
            aa, bb, ab = three_products(sum_a, sum_b)
            tl.store(at, aa)
            tl.store(at + pair, bb)
            tl.store(at + 2 * pair, ab)
            total_b += sum_b
        else:
            tl.store(at, square(sum_a))
        total_a += sum_a
    if TRANSPOSED:
        into = i.to(tl.int64)[:, None] * outputs + o[None, :]
        held = i_held[:, None] & o_held[None, :]
    else:
        into = o.to(tl.int64)[:, None] * inputs + i[None, :]
        held = o_held[:, None] & i_held[None, :]
    if ADD:
        total_a += tl.load(p_at + into, mask=held, other=0.0).to(tl.float32)
    tl.store(p_at + into, total_a.to(p_at.dtype.element_ty), mask=held)
    if STREAMS == 2:
        if ADD:
            total_b += tl.load(s_at + into, mask=held, other=0.0).to(tl.float32)
        tl.store(s_at + into, total_b.to(s_at.dtype.element_ty), mask=held)


def weight_products(
    x: Tensor,
    dys: list[Tensor],
    layout: Layout,
    totals: list[Tensor],
    *,
    transposed: bool,
    add: bool,
    tiles: Tiles | None = None,
) -> Tensor:
    """(pairs, responses + strata) float64 inner products; the gradients are written to `totals`, or added to them.

    Args:
        x: (rows, inputs) float16, bfloat16 or float32, the last dimension dense.
        dys: of either stream, (rows, outputs) in the dtype of x, the last dimension dense.
        layout: of the rows.
        totals: of either stream, in the weight's shape, dense, of any floating dtype.
        transposed: whether the weight is stored (inputs, outputs).
        add: to what is there.
        tiles: else chosen by the sizes.
    """
    inputs, outputs = x.shape[1], dys[0].shape[1]
    form = tiles_for(x.shape[0] / layout.responses, inputs, outputs, x.dtype) if tiles is None else tiles
    programs = triton.cdiv(outputs, form.outputs) * triton.cdiv(inputs, form.inputs)
    pairs = 3 if len(dys) == 2 else 1
    strata = len(layout.strata)
    order, starts, ends, bounds = layout.places
    found = x.new_empty((pairs, layout.responses + strata, programs), dtype=torch.float64)
    with torch.cuda.device_of(x):  # a launch goes to the current device
        _kernel[(programs,)](
            x,
            dys[0],
            dys[-1],
            order if layout.gathered is None else layout.gathered,
            starts,
            ends,
            order,
            bounds,
            totals[0],
            totals[-1],
            found,
            layout.responses,
            strata,
            programs,
            inputs,
            outputs,
            x.stride(0),
            dys[0].stride(0),
            dys[-1].stride(0),
            STREAMS=len(dys),
            GATHER=layout.gathered is not None,
            TRANSPOSED=transposed,
            ADD=add,
            OUT=form.outputs,
            IN=form.inputs,
            ROWS=form.rows,
            GROUP=_GROUP,
            PRECISION=form.precision,
            WIDEN=x.device.type == "cpu",
            num_warps=form.warps,
            num_stages=form.stages,
        )
    return found.sum(dim=-1)
