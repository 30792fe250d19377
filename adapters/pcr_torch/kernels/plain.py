"""The products of weights and biases in plain PyTorch, for any device; nothing waits for it.

Per-response gradients are formed for as many rows of the weight at a time as a workspace holds, of all responses in one
batched product; or, for short responses, not at all: <G_i, H_i> is the sum of (X_i X_i^T) * (dY_i dZ_i^T), matrices of
tokens x tokens. How many operators are dispatched does not depend on the number of responses or strata.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcr_torch.kernels.layout import Layout
from pcr_torch.pullback import PAIRS, wide_dtype

WORKSPACE = 1 << 27  # elements of explicit gradients held at once
# multiply-adds that a pass over one element of an explicit gradient is worth, from an H100's ratio of the two
_PASS = {torch.float16: 1024, torch.bfloat16: 1024}
_PASS_FLOAT32 = 64
_EXPONENT = 0x7F800000  # bits of a float32


def weight_products(
    x: Tensor,
    dys: Sequence[Tensor],
    layout: Layout,
    *,
    transposed: bool,
    by_gram: bool | None = None,
    workspace: int = WORKSPACE,
) -> tuple[list[Tensor], Tensor]:
    """Gradient per stream, float32 or wider, and (pairs, responses + strata) inner products.

    Args:
        x: (rows, inputs) activations.
        dys: of either stream, (rows, outputs) output gradients.
        layout: of the rows.
        transposed: whether the weight is stored (inputs, outputs).
        by_gram: whether by matrices of tokens x tokens; else the cheaper.
        workspace: elements of explicit gradients held at once.
    """
    if by_gram is None:
        by_gram = prefers_gram(layout, x, dys)
    # powers of two next to the largest number: squares stay in float32, and what is divided by them is exact
    (x, *dys), scales = _near_one([x, *dys])
    pairs, wide = PAIRS[len(dys)], wide_dtype(x.device)
    scales = scales[1:] * scales[0]
    arrange = layout.by_stratum if by_gram else layout.by_response
    tokens, outputs = arrange(x), [arrange(dy) for dy in dys]
    lefts = [tokens] * len(dys) if transposed else outputs
    rights = outputs if transposed else [tokens] * len(dys)
    height, width = lefts[0].shape[2], rights[0].shape[2]
    sets = len(tokens) if by_gram else len(tokens) + len(layout.strata)
    step = max(1, workspace // (sets * width * len(dys)))
    totals: list[list[Tensor]] = [[] for _ in dys]
    response, stratum = [], []
    for start in range(0, height, step):
        parts = [_product(left[..., start : start + step].mT, right) for left, right in zip(lefts, rights, strict=True)]
        if not by_gram:
            response.append(torch.stack([_dots(parts[a], parts[b], wide) for a, b in pairs]))
            parts = [layout.stratum_sums(part) for part in parts]
        stratum.append(torch.stack([_dots(parts[a], parts[b], wide) for a, b in pairs]))
        for total, part in zip(totals, parts, strict=True):
            total.append(part.sum(dim=0))
    if by_gram:
        response = [_token_grams(layout.by_response(x), [layout.by_response(dy) for dy in dys], wide)]
    products = torch.cat([_summed(response), _summed(stratum)], dim=1)
    whole = [torch.cat(total) if len(total) > 1 else total[0] for total in totals]
    return _scaled_back(whole, products, scales)


def vector_products(dys: Sequence[Tensor], layout: Layout) -> tuple[list[Tensor], Tensor]:
    """The same of a bias, whose gradient is the sum over the rows."""
    dys, scales = _near_one(dys)
    wide, n = wide_dtype(dys[0].device), layout.responses
    parts = [layout.by_response(dy).sum(dim=1, dtype=_single(dy.dtype)) for dy in dys]
    parts = [torch.cat([part, layout.stratum_sums(part)]) for part in parts]
    products = torch.stack([(parts[a] * parts[b]).sum(dim=1, dtype=wide) for a, b in PAIRS[len(dys)]])
    return _scaled_back([part[n:].sum(dim=0) for part in parts], products, scales)


def prefers_gram(layout: Layout, x: Tensor, dys: Sequence[Tensor]) -> bool:
    """Whether token Grams cost less than passes over explicit gradients; strata's sums are formed in either case."""
    features, outputs = x.shape[1], dys[0].shape[1]
    longest = int(layout.lengths.max())
    grams = longest**2 * (features + len(PAIRS[len(dys)]) * outputs)
    spared = 1 - len(layout.strata) / layout.responses
    return grams < spared * _PASS.get(x.dtype, _PASS_FLOAT32) * features * outputs


def _token_grams(tokens: Tensor, outputs: Sequence[Tensor], wide: torch.dtype) -> Tensor:
    """(pairs, responses) of factors near one."""
    gram = _product(tokens, tokens.mT)
    return torch.stack(
        [(gram * _product(outputs[a], outputs[b].mT)).sum(dim=2).sum(dim=1, dtype=wide) for a, b in PAIRS[len(outputs)]]
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched, accumulated and returned in float32 or wider."""
    if a.dtype in (torch.float16, torch.bfloat16):
        if a.device.type == "cuda" and torch.version.hip is None:
            return torch.bmm(a, b, out_dtype=torch.float32)
        return torch.bmm(a.float(), b.float())
    return torch.bmm(a, b)


def _dots(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """(sets, height, width) -> (sets,), in the tensors' dtype along a row, float64 from there on."""
    return (a * b).sum(dim=2).sum(dim=1, dtype=wide)


def _summed(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(dim=0) if len(parts) > 1 else parts[0]


def _near_one(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Each by the power of two next to its largest number, exactly, and these, (tensors,); by 1 if that is not finite.

    Numbers of float16 are near enough to one, and would lose digits; those of float64 have room.
    """
    dtype, device = tensors[0].dtype, tensors[0].device
    if dtype in (torch.float16, torch.float64):
        return list(tensors), torch.ones(len(tensors), dtype=wide_dtype(device), device=device)
    largest = torch.stack(torch._foreach_norm(list(tensors), ord=float("inf"))).float()
    # the number without its fraction; no less than the least that is not denormal
    power = (largest.view(torch.int32) & _EXPONENT).clamp(min=1 << 23).view(torch.float32)
    scales = torch.where(largest.isfinite(), power, 1.0)
    near = [(t / scale).to(dtype) for t, scale in zip(tensors, scales.unbind(), strict=True)]
    return near, scales.to(wide_dtype(device))


def _scaled_back(totals: list[Tensor], products: Tensor, scales: Tensor) -> tuple[list[Tensor], Tensor]:
    """Of sums of factors near one, by the streams' scales (streams,)."""
    squares = scales * scales
    products *= (squares if len(totals) == 1 else torch.cat([squares, scales.prod().view(1)]))[:, None]
    back = scales.to(totals[0].dtype).unbind()
    return [total.mul_(scale) for total, scale in zip(totals, back, strict=True)], products


def _single(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
