"""TorchJD's aggregators as rules: they take P and S as the two rows of a block's Jacobian and return a combination.

All of them depend on the rows through their 2 x 2 Gram matrix alone and return one weight a row, so TorchJD's own
weighting classes supply (a, b) from the statistics that every rule gets. A run takes one by the name of its class,
`Settings(rule="benchmarks.learning.peers:UPGrad")`.

UPGrad and CAGrad combine means over rows; here both weights are doubled, so that P + S comes out without conflict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from pcr_core import BlockStatistics, Weights
from pcr_core.projection import check_statistics, report

try:
    from torchjd import aggregation
except ImportError as error:
    raise ImportError(
        f"rules of TorchJD need it ({error}): pip install --no-deps torchjd; for UPGrad qpsolvers and quadprog too, "
        "for CAGrad 'torchjd[cagrad]'"
    ) from error


@dataclass(frozen=True)
class _Peer:
    """Weights of one of TorchJD's methods for each block; torch statistics, on any device."""

    def weighting(self) -> Any:
        raise NotImplementedError

    def __call__(self, stats: BlockStatistics[torch.Tensor], /) -> Weights[torch.Tensor]:
        xp = check_statistics(stats)
        rows = [stats.plasticity_sq, stats.dot, stats.dot, stats.stability_sq]
        grams = torch.stack(rows, dim=-1).reshape(-1, 2, 2).double().cpu()
        weighting = self.weighting()
        nothing = torch.full((2,), math.nan, dtype=torch.float64)
        found = [weighting(gram) if gram.isfinite().all() else nothing for gram in grams]
        a, b = (torch.stack(found) if found else grams.new_zeros(0, 2)).to(stats.dot).unbind(-1)
        return report(xp, stats, plasticity=a, stability=b, alpha=torch.zeros_like(a))


@dataclass(frozen=True)
class PCGrad(_Peer):
    """Yu et al. 2020."""

    def weighting(self) -> Any:
        return aggregation.PCGradWeighting()


@dataclass(frozen=True)
class MGDA(_Peer):
    """Desideri 2012, by Frank-Wolfe steps."""

    def weighting(self) -> Any:
        return aggregation.MGDAWeighting()


@dataclass(frozen=True)
class UPGrad(_Peer):
    """Quinton and Rey 2024: each row projected onto the dual cone of both, and summed."""

    def weighting(self) -> Any:
        return aggregation.UPGradWeighting(pref_vector=torch.ones(2, dtype=torch.float64))


@dataclass(frozen=True)
class CAGrad(_Peer):
    """Liu et al. 2021, in a ball of c times the mean's length."""

    c: float = 0.5

    def weighting(self) -> Any:
        inner = aggregation.CAGradWeighting(c=self.c)
        return lambda gram: 2 * inner(gram)
