"""`pcr_torch.PCR` in a plain PyTorch loop, on one process or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pcr_core
from pcr_conformance.trainers.adapter import TRAINER_CAPABILITIES, TrainerDefaults
from pcr_conformance.trainers.problem import Normalization, Rows, TrainerBatch, TrainerProblem, TrainerResult
from pcr_conformance.trainers.stacks.gloo import on_ranks
from pcr_core import BlockStatistics
from pcr_torch import PCR


class TinyModel(nn.Module):
    """The problem's language model."""

    def __init__(self, weights: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        words, features = weights["embed"].shape
        hidden = weights["up"].shape[1]
        self.embed = nn.Embedding(words, features)
        self.up = nn.Linear(features, hidden, bias=False)
        self.down = nn.Linear(hidden, features, bias=False)
        self.head = nn.Linear(features, words, bias=False)
        self.to(dtype)
        with torch.no_grad():
            for name, weight in weights.items():
                value = torch.tensor(weight)
                self.get_parameter(f"{name}.weight").copy_(value if name == "embed" else value.T)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embed(tokens)
        count = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[:, None]
        x = embedded + embedded.cumsum(dim=1) / count
        logits: Tensor = self.head(x + self.down(torch.tanh(self.up(x))))
        return logits

    def logp(self, batch: TrainerBatch) -> Tensor:
        """(n, T) log-probabilities of the response tokens."""
        tokens = torch.tensor(batch.tokens)
        logs = self(tokens)[:, batch.prompt - 1 : -1].log_softmax(-1)
        chosen: Tensor = logs.gather(-1, tokens[:, batch.prompt :, None]).squeeze(-1)
        return chosen

    def as_numpy(self) -> dict[str, Any]:
        found = {name.removesuffix(".weight"): p.detach().numpy().copy() for name, p in self.named_parameters()}
        return {name: weight if name == "embed" else weight.T for name, weight in found.items()}


class TorchTrainer(TrainerDefaults):
    """Plain SGD on what `PCR.resolve` writes into `.grad`; on two processes under DistributedDataParallel's rules.

    Args:
        norms: how `pcr_torch.PCR` measures, "auto" or "loop".
        dtype: "float32" or "float64".
    """

    capabilities = TRAINER_CAPABILITIES
    normalizations: tuple[Normalization, ...] = ("grpo", "dapo", "dr_grpo")
    software = f"torch {torch.__version__}"

    def __init__(self, norms: Any = "auto", dtype: str = "float32") -> None:
        self.norms, self.dtype = norms, dtype
        self.name = "torch-loop" if norms == "loop" else "torch"

    def train(self, problem: TrainerProblem, checkpoint: Any = None) -> TrainerResult:
        if problem.processes == 1:
            return _train(0, problem, checkpoint, self.norms, self.dtype)
        first, *_ = on_ranks(_train, problem.processes, problem, checkpoint, self.norms, self.dtype)
        return first  # type: ignore[no-any-return]


def _train(rank: int, problem: TrainerProblem, checkpoint: Any, norms: Any, dtype: str) -> TrainerResult:
    """One of `problem.processes` ranks."""
    model = TinyModel(problem.weights, getattr(torch, dtype))
    pattern = "|".join(problem.blocks)
    method = PCR(
        model,
        blocks=rf"({pattern})\.weight",
        rule=problem.rule,
        norms=norms,
        noise_every=1,
        process_group=dist.group.WORLD if problem.processes > 1 else None,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.learning_rate)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        method.load_state_dict(checkpoint["method"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    reports = []
    for batch in problem.batches:
        optimizer.zero_grad()
        for rows in batch.split[rank]:
            _accumulate(problem, model, method, batch, rows)
        report = method.resolve()
        optimizer.step()
        reports.append(
            in_order([block.name.split(".")[0] for block in report.blocks], problem.blocks, report.statistics)
        )
    kept = {"model": model.state_dict(), "method": method.state_dict(), "optimizer": optimizer.state_dict()}
    return TrainerResult(model.as_numpy(), kept, reports)


def _accumulate(problem: TrainerProblem, model: TinyModel, method: PCR, batch: TrainerBatch, rows: Rows) -> None:
    part, logp = batch.rows(rows), model.logp(batch.rows(rows))
    old, ref, advantages = (torch.tensor(x, dtype=logp.dtype) for x in (part.logp_old, part.logp_ref, part.advantages))
    objective = pcr_core.grpo_objective(
        logp,
        old,
        ref,
        advantages,
        torch.tensor(part.mask),
        beta=problem.beta,
        clip=problem.clip,
        normalization=problem.normalization,
        normalizer=problem.normalizer(batch) / problem.processes,  # gradients are means over the ranks
    )
    method.accumulate(logp, objective, group_ids=torch.tensor(part.group_ids))


def in_order(names: Sequence[str], blocks: Sequence[str], found: BlockStatistics[Tensor]) -> BlockStatistics[Any]:
    at = [names.index(b) for b in blocks]
    values = (getattr(found, f.name) for f in fields(BlockStatistics))
    return BlockStatistics(*(None if v is None else v.numpy()[at] for v in values))
