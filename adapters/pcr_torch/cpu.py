"""Products of gradients on a CPU, where memory decides: NumPy views of torch tensors, and tiles that stay in a cache.

All tricks for a CPU are here. A torch tensor on a CPU and `tensor.numpy()` share their memory. NumPy has the faster
inner products (`vecdot`) and sums, and a lower cost per call, on what lies in a core's cache; torch has the faster
matrix products. So gradients are formed by torch a tile at a time, and read by NumPy before the tile leaves the cache.
`pcr_torch.kernels` has the same functions for accelerators.

Response i contributes G_i = L_i^T R_i, a sum over its tokens, with (L, R) the output gradient and the input (or the
other way round, by how the weight is stored). Two ways, chosen by a count of operations:

- explicit: form every G_i, take its products while it is in cache, add it into the sum. No extra matrix product.
- gram: <G_i, H_i> is the sum of (X_i X_i^T) * (dY_i dZ_i^T), matrices of tokens x tokens; only the sums of strata are
  formed. It wins for short responses, the more of them a stratum has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcr_torch.products import Products, single, token_grams
from pcr_torch.pullback import PAIRS

_TILE = 6 << 16  # elements
_LANES = 64  # rows of a tile come in such bunches, which matrix products like
_DOT = 1 << 11  # elements whose products float32 sums
_GLANCE = 4  # features by which all but a few tokens with a gradient are told
_SMALL = 1 << 16  # elements of all responses' gradients that stay in a cache: calls cost more than passes over them
_GRAM_COST = 16  # multiply-adds that a pass over one explicit element is worth; measured on a CPU
_ROW = 1 << 10  # float32 dot products of this length err by 5e-7 of |a||b| at most, also where all terms are equal
_PART = 1 << 18  # operands of this length stay in a cache, and calls are few


def weight_products(
    x: Tensor,
    dys: Sequence[Tensor],
    strata: Sequence[Sequence[int]],
    *,
    transposed: bool,
) -> Products:
    """Products of a linear layer's weight, on a CPU.

    Args:
        x: (n, T, in) the layer's input.
        dys: one or two (n, T, out) gradients of its output.
        strata: rows of each stratum, together 0 to n - 1.
        transposed: whether the weight is stored (in, out).
    """
    by_gram = prefers_gram(x.shape[1], x.shape[2], dys[0].shape[2], len(dys), len(strata) / x.shape[0])
    x, dys = single(x.detach()), [single(dy) for dy in dys]
    if x.shape[0] * x.shape[2] * dys[0].shape[2] <= _SMALL:
        return _at_once(x, dys, strata, transposed=transposed)
    if not by_gram:
        spans = _spans(x, dys)
        rows = [[each[span] for each, span in zip(t, spans, strict=True)] for t in (x, *dys)]
        return _tiled(rows[0], rows[1:], strata, transposed=transposed)
    response = token_grams(x, dys)
    # a stratum's tokens in one product, as if they were of one response
    rows = [[t[list(members)].flatten(0, 1) for members in strata] for t in (x, *dys)]
    sums = _tiled(rows[0], rows[1:], [[q] for q in range(len(strata))], transposed=transposed)
    return Products(sums.totals, response, sums.stratum)


def prefers_gram(length: int, features: int, outputs: int, streams: int, sums: float = 0.0) -> bool:
    """Whether token Grams cost less than passes over explicit gradients.

    Args:
        length: tokens of a response.
        features: of the input.
        outputs: of the layer.
        streams: one or two.
        sums: strata a response, whose explicit sums are formed in either case.
    """
    grams = length**2 * (features + len(PAIRS[streams]) * outputs)
    return grams < (1 - sums) * _GRAM_COST * features * outputs


def short_products(x: Any, y: Any, joined: int | None) -> Tensor:
    """The three products by rows, in NumPy, whose BLAS takes half the time of torch.dot on what is in a cache."""
    rows, step = len(x) // _ROW, _PART // _ROW
    one, other = (t[: rows * _ROW].reshape(rows, _ROW) for t in (x, y))
    short = np.empty((3, rows), dtype=np.float32)
    apart = np.empty(0 if joined is None else (step, _ROW), dtype=np.float32)
    with np.errstate(all="ignore"):  # overflow is seen in the sums
        for start in range(0, rows, step):
            at = slice(start, start + step)
            a, b = one[at], other[at]
            if joined == 0:
                a = np.subtract(a, b, out=apart[: len(a)])
            elif joined == 1:
                b = np.subtract(b, a, out=apart[: len(a)])
            np.vecdot(a, b, out=short[2, at])  # brings both into a cache for the other two
            np.vecdot(a, a, out=short[0, at])
            np.vecdot(b, b, out=short[1, at])
        a, b = (t[rows * _ROW :] for t in (x, y))
        a, b = (a - b if joined == 0 else a), (b - a if joined == 1 else b)
        rest = np.stack([np.vecdot(a, a), np.vecdot(b, b), np.vecdot(a, b)])
        return torch.from_numpy(short.sum(axis=1, dtype=np.float64) + rest)


def _spans(x: Tensor, dys: Sequence[Tensor]) -> list[slice]:
    """Each response's tokens from the first that contributes to the last; padding does not, nor what has no loss."""
    gradients = [dy.numpy() for dy in dys]
    used = np.logical_or.reduce([g[..., :_GLANCE].any(axis=-1) for g in gradients])
    idle = ~used
    used[idle] = ~np.isfinite(x.numpy()[idle]).all(axis=-1)  # 0 times infinity is to be seen
    for g in gradients:
        used[idle] |= g[idle].any(axis=-1)
    first, beyond = used.argmax(axis=1), used.shape[1] - used[:, ::-1].argmax(axis=1)
    return [slice(a, b if some else a) for a, b, some in zip(first, beyond, used.any(axis=1), strict=True)]


@np.errstate(all="ignore")
def _at_once(x: Tensor, dys: Sequence[Tensor], strata: Sequence[Sequence[int]], *, transposed: bool) -> Products:
    """All responses of a small weight in a few calls, however many they are."""
    n, tokens = len(x), x.numpy()
    height, width = (x.shape[2], dys[0].shape[2]) if transposed else (dys[0].shape[2], x.shape[2])
    # of each stream the gradients of responses, then those of strata
    gradients = np.empty((len(dys), n + len(strata), height, width), dtype=tokens.dtype)
    even = _even(tuple(map(tuple, strata)), n)
    for each, dy in zip(gradients, dys, strict=True):
        left, right = (tokens, dy.numpy()) if transposed else (dy.numpy(), tokens)
        np.matmul(left.transpose(0, 2, 1), right, out=each[:n])
        if even:
            np.add.reduce(each[:n].reshape(len(strata), -1, height, width), axis=1, out=each[n:])
            continue
        for members, total in zip(strata, each[n:], strict=True):
            np.add.reduce(each[list(members)], axis=0, out=total)
    found = np.empty((len(PAIRS[len(dys)]), n + len(strata)))
    for (a, b), products in zip(PAIRS[len(dys)], found, strict=True):
        # in the arrays' dtype along a row, float64 from there on
        np.add.reduce(np.vecdot(gradients[a], gradients[b]), axis=1, dtype=np.float64, out=products)
    totals = [torch.from_numpy(each[n:].sum(axis=0)) for each in gradients]
    return Products(totals, torch.from_numpy(found[:, :n]), torch.from_numpy(found[:, n:]))


@cache
def _even(strata: tuple[tuple[int, ...], ...], n: int) -> bool:
    """Whether strata are equally many neighbours, all n responses in order."""
    rows = [i for members in strata for i in members]
    return rows == list(range(n)) and len({len(members) for members in strata}) == 1


@np.errstate(all="ignore")  # what is not finite stays so, and is seen by whoever resolves
def _tiled(
    x: Sequence[Tensor], dys: Sequence[Sequence[Tensor]], strata: Sequence[Sequence[int]], *, transposed: bool
) -> Products:
    """One response and a few rows of the weight at a time, which stay in a core's cache until all is taken from them.

    Args:
        x: of each response, (tokens, in); float32 or wider.
        dys: the same per stream, (tokens, out).
        strata: see `weight_products`.
        transposed: see `weight_products`.
    """
    lefts, rights = ([x] * len(dys), dys) if transposed else (dys, [x] * len(dys))
    n, pairs = len(x), PAIRS[len(dys)]
    height, width, dtype = lefts[0][0].shape[1], rights[0][0].shape[1], x[0].dtype
    step = max(_LANES, _TILE // width // _LANES * _LANES)
    totals = [torch.empty(height, width, dtype=dtype) for _ in dys]
    scratch = torch.empty(2, len(dys), min(step, height), width, dtype=dtype)
    whole = [[each.T for each in left] for left in lefts]
    bunch = math.gcd(height, step, 1 << max(0, (_DOT // width).bit_length() - 1))  # rows of the tile in one product
    by_row = np.empty((n + len(strata), len(pairs), step // bunch), dtype=scratch.numpy().dtype)
    sums = np.zeros(by_row.shape[:2])
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        slices = [[each[rows] for each in stream] for stream in whole]
        dots = by_row[:, :, : (rows.stop - start) // bunch]
        tiles = ([t[rows] for t in totals], *scratch[:, :, : rows.stop - start])
        total, summed, one = (_Tile(t, dots.shape[-1]) for t in tiles)
        turn = iter(dots)
        for q, members in enumerate(strata):
            stratum = summed if q else total
            for k, i in enumerate(members):
                held = one if k else stratum
                for stream, gradient in enumerate(held.tensors):
                    torch.mm(slices[stream][i], rights[stream][i], out=gradient)
                mine = next(turn)
                held.dots(mine)
                if k:
                    stratum.add(one)
            if len(members) == 1:
                next(turn)[:] = mine
            else:
                stratum.dots(next(turn))
            if q:
                total.add(stratum)
        sums += dots.sum(axis=-1, dtype=np.float64)
    # in the order of the loop: the responses of a stratum, then the stratum
    places = [i for q, members in enumerate(strata) for i in (*members, n + q)]
    found = torch.empty(len(pairs), len(sums), dtype=torch.float64)
    found[:, places] = torch.from_numpy(sums.T)
    return Products(totals, found[:, :n], found[:, n:])


class _Tile:
    """Rows (rows, columns) of each stream's gradient; NumPy is the faster on what lies in the cache."""

    def __init__(self, gradients: Iterable[Tensor], bunches: int) -> None:
        self.tensors = list(gradients)
        self._arrays = [t.numpy() for t in self.tensors]
        self._bunches = [a.reshape(bunches, -1) for a in self._arrays]

    def add(self, other: _Tile) -> None:
        for mine, more in zip(self._arrays, other._arrays, strict=True):
            np.add(mine, more, out=mine)

    def dots(self, into: Any) -> None:
        """PAIRS over bunches of rows; `into` (pairs, bunches)."""
        streams = self._bunches
        for k, (a, b) in reversed(list(enumerate(PAIRS[len(streams)]))):  # <P, S> first: it brings both into the cache
            np.vecdot(streams[a], streams[b], out=into[k])
