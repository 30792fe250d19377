"""From totals and per-response inner products of parameters to the statistics of blocks, on one process or on many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pcr_core
from pcr_core import BlockStatistics, Scatter
from pcr_torch.blocks import Block
from pcr_torch.combine import all_products
from pcr_torch.distributed import Ranks
from pcr_torch.pullback import Pulled, Total

Totals = tuple[Total, Total]


@dataclass(frozen=True)
class BlockSums:
    """Sums over the parameters of each block.

    Attributes:
        parameters: by name, in the order of all arrays "per parameter".
        block_of: (parameters,) index of each one's block.
        blocks: number of blocks.
        ranks: over which totals and scatter are summed; None for one process.
    """

    parameters: Mapping[str, nn.Parameter]
    block_of: Tensor
    blocks: int
    ranks: Ranks | None

    @classmethod
    def over(cls, blocks: Sequence[Block], parameters: Mapping[str, nn.Parameter], ranks: Ranks | None) -> BlockSums:
        index = {name: b for b, block in enumerate(blocks) for name in block.parameters}
        return cls(parameters, torch.tensor([index[name] for name in parameters]), len(blocks), ranks)

    def scatter(self, streams: tuple[int, ...], pulled: Pulled, ids: Tensor) -> Scatter[Tensor]:
        """Scatter of one micro-batch, whose responses lie in strata `ids`."""
        response = self._per_block(pulled.response.cpu())
        stratum = self._per_block(pulled.stratum.cpu())
        nothing = torch.zeros(self.blocks, dtype=response.dtype)
        variances = [nothing, nothing]
        for pair, stream in enumerate(streams):
            variances[stream] = pcr_core.stratified_variance(response[pair], stratum[pair], ids)
        shared = len(streams) == 2
        covariance = pcr_core.stratified_covariance(response[2], stratum[2], ids) if shared else nothing
        return Scatter(variances[0], variances[1], covariance)

    def no_scatter(self) -> Scatter[Tensor]:
        """Scatter of a rank that accumulated nothing: zeros."""
        nothing = torch.zeros(self.blocks, dtype=torch.float64)
        return Scatter(nothing, nothing, nothing)

    def statistics(
        self, totals: Totals, scatter: Scatter[Tensor] | None, *, joined: int | None = None, merged: bool = False
    ) -> BlockStatistics[Tensor]:
        """Statistics of the whole batch, in one all-reduce.

        Args:
            totals: P and S, but P + S in the place `joined`.
            scatter: None where the noise was not measured.
            merged: whether the scatter is that of all ranks already, not of this one.
        """
        sums = self._products(totals, joined)
        if scatter is not None:
            noise = torch.stack([scatter.plasticity_var, scatter.stability_var, scatter.covariance]).double()
            sums = torch.cat([sums, noise])
        if self.ranks is not None:
            sums = self.ranks.sum(sums)
            if scatter is not None:
                sums[3:] = noise if merged else sums[3:] / self.ranks.world**2
        sizes = torch.tensor([parameter.numel() for parameter in self.parameters.values()], dtype=torch.float64)
        return BlockStatistics(
            plasticity_sq=sums[0],
            stability_sq=sums[1],
            dot=sums[2],
            plasticity_var=None if scatter is None else sums[3],
            stability_var=None if scatter is None else sums[4],
            covariance=None if scatter is None else sums[5],
            size=self._per_block(sizes),
        )

    def _products(self, totals: Totals, joined: int | None) -> Tensor:
        """(3, blocks) inner products of the totals, |P|^2, |S|^2, <P, S>: this rank's part of them."""
        p, s = totals
        found = torch.zeros(len(self.parameters), 3, dtype=torch.float64)
        shares = [
            1.0 if self.ranks is None else self.ranks.share(k, parameter)
            for k, parameter in enumerate(self.parameters.values())
        ]
        counted = {name: k for k, name in enumerate(self.parameters) if shares[k]}
        both = {name: k for name, k in counted.items() if name in p and name in s}
        if both:
            found[list(both.values())] = all_products(
                [p[name] for name in both], [s[name] for name in both], joined=joined
            )
        for stream, total in enumerate(totals):
            alone = {name: k for name, k in counted.items() if name in total and name not in both}
            if alone:
                squares = all_products([total[name] for name in alone], [total[name] for name in alone])
                found[list(alone.values()), stream] = squares[:, 0]
        return self._per_block((found * torch.tensor(shares, dtype=torch.float64)[:, None]).T.contiguous())

    def _per_block(self, per_parameter: Tensor) -> Tensor:
        """(..., parameters) -> (..., blocks), summed."""
        out = torch.zeros(*per_parameter.shape[:-1], self.blocks, dtype=per_parameter.dtype)
        return out.index_add_(-1, self.block_of, per_parameter)
