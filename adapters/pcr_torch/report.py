"""What `PCR.resolve` did, for people and for logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pcr_core import BlockStatistics, Weights
from pcr_core._summary import summary
from pcr_torch.baseline import Shift
from pcr_torch.blocks import Block

Path: TypeAlias = Literal["autograd", "fast", "loop", "mixed"]


@dataclass(frozen=True)
class Report:
    """Weights and statistics of each block; all arrays float64 on the CPU, shape (blocks,).

    Attributes:
        blocks: in the order of the arrays.
        weights: what the rule decided, `pcr_core.Weights`.
        statistics: what it decided on, of the totals, `pcr_core.BlockStatistics`.
        measured: false in the steps that `every` leaves out, whose report is that of the last measured step.
        path: how the gradients were had: "autograd", without noise; or with the noise by "fast", "loop" or "mixed", as
            `PCR.norms` says.
        baseline: b as it was applied, and what it did; None without one.
    """

    blocks: tuple[Block, ...]
    weights: Weights[Tensor]
    statistics: BlockStatistics[Tensor]
    measured: bool = True
    path: Path = "fast"
    baseline: Shift | None = None

    def state_dict(self) -> dict[str, Any]:
        """The arrays by name, for a checkpoint."""
        return {"weights": _arrays(self.weights), "statistics": _arrays(self.statistics), "path": self.path}

    @classmethod
    def from_state(cls, blocks: tuple[Block, ...], state: Mapping[str, Any]) -> Report:
        """The inverse of `state_dict`."""
        return cls(blocks, Weights(**state["weights"]), BlockStatistics(**state["statistics"]), path=state["path"])

    @property
    def finite(self) -> bool:
        """Whether every block's statistics and update are finite; an update may be beyond what its dtype holds."""
        return bool(self.weights.finite.all())

    def nonfinite_blocks(self) -> tuple[str, ...]:
        """Names of the blocks with non-finite gradients or a non-finite update."""
        return tuple(b.name for b, ok in zip(self.blocks, self.weights.finite.tolist(), strict=True) if not ok)

    def metrics(self, prefix: str = "pcr/") -> dict[str, float]:
        """Summary over all blocks, as logged.

        conflict_rate, cosine, alpha, boost (b - 1, the addition to the KL coefficient in units of beta) are means over
        blocks; removed is |removed part of P|/|P| over all coordinates, norms and noise-to-signal ratios likewise.
        noise_share is sum v_ps/sum <P, S> over the blocks with <P, S> < 0, the part of their conflict that is noise
        both streams share (0 without conflict); debiased means <P, S> - v_ps in place of <P, S>. These and the
        noise-to-signal ratios are absent where the noise was not measured. With a baseline also baseline, b as it was
        applied, and where the noise was measured baseline_reduction, the estimated share of P's variance that it took
        away.
        """
        found = summary(self.weights, self.statistics, slice(None), prefix)
        if self.baseline is not None:
            found[prefix + "baseline"] = self.baseline.applied
            if self.baseline.reduction is not None:
                found[prefix + "baseline_reduction"] = self.baseline.reduction
        return found

    def layer_metrics(self, prefix: str = "pcr/") -> dict[str, float]:
        """The same per layer, with keys such as `pcr/layer_03/cosine`; blocks outside layers are left out.

        Of a model with several stacks of layers, such as a vision tower: `pcr/visual.blocks/layer_03/cosine`.
        """
        layers = sorted({(block.stack or "", block.layer) for block in self.blocks if block.layer is not None})
        several = len({stack for stack, _ in layers}) > 1
        out: dict[str, float] = {}
        for stack, layer in layers:
            here = [i for i, b in enumerate(self.blocks) if b.layer == layer and (b.stack or "") == stack]
            where = f"{stack}/layer_{layer:02d}/" if several else f"layer_{layer:02d}/"
            out |= summary(self.weights, self.statistics, torch.tensor(here), prefix + where)
        return out


def _arrays(record: Weights[Tensor] | BlockStatistics[Tensor]) -> dict[str, Tensor | None]:
    return {f.name: getattr(record, f.name) for f in fields(record)}
