"""A GRPO update to be timed: model, batch, and the ways of taking it that all tables have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import pcr_core
from pcr_torch import PCR

Way = Callable[[], AbstractContextManager[Callable[[], None]]]
DOCUMENTED: Mapping[str, Any] = {  # the model of the tables in README.md
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


class Problem:
    """A Qwen2-like model, a batch of responses in groups of 4, and what the ways have in common.

    Args:
        device: where all of it is.
        responses: a multiple of 4 times `micro_batches`.
        tokens: of each response.
        config: of the model, but for the vocabulary.
        vocabulary: its size.
        micro_batches: of an update.
        dtype: of the weights.
    """

    def __init__(
        self,
        device: str,
        responses: int,
        tokens: int,
        vocabulary: int,
        micro_batches: int = 1,
        config: Mapping[str, Any] = DOCUMENTED,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **config))
        self.model = model.to(device, dtype)
        self.tokens = torch.randint(vocabulary, (responses, tokens + 1), device=device)
        self.group_ids = torch.arange(responses, device=device) // 4
        self.advantages = torch.randn(responses, device=device)
        self.noise = [0.1 * torch.randn(responses, tokens, device=device) for _ in range(2)]
        self.parameters = dict(self.model.named_parameters())
        self.blocks = [name for name in self.parameters if ".mlp." in name]
        size = responses // micro_batches
        self.parts = [slice(start, start + size) for start in range(0, responses, size)]
        layers = self.model.config.num_hidden_layers
        self.upper = rf"layers\.({'|'.join(str(i) for i in range(layers // 2, layers))})\.mlp"

    def logp(self, rows: slice = slice(None)) -> Tensor:
        return token_logp(self.model(input_ids=self.tokens[rows], use_cache=False).logits, self.tokens[rows])

    def cotangents(self, logp: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Of the rows, with the normalisation of the whole batch."""
        now = logp.detach()
        objective = pcr_core.grpo_objective(
            now,
            now + self.noise[0][rows],
            now + self.noise[1][rows],
            self.advantages[rows],
            torch.ones_like(now, dtype=torch.bool),
            beta=0.05,
        )
        share = logp.shape[0] / self.tokens.shape[0]
        return share * objective.plasticity_cotangent, share * objective.stability_cotangent


def token_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    """(n, T) in float32."""
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1).float()


def vanilla(p: Problem) -> Way:
    """One forward and one backward pass of the summed loss."""

    def job() -> None:
        for rows in p.parts:
            logp = p.logp(rows)
            plasticity, stability = p.cotangents(logp, rows)
            logp.backward(plasticity + stability)

    return plain(p, job)


def two_passes(p: Problem) -> Way:
    """What both gradients cost without norms, decisions, or anything but autograd."""

    def job() -> None:
        leaves = list(p.parameters.values())
        for rows in p.parts:
            logp = p.logp(rows)
            plasticity, stability = p.cotangents(logp, rows)
            one = torch.autograd.grad(logp, leaves, plasticity, retain_graph=True)
            for leaf, first, second in zip(leaves, one, torch.autograd.grad(logp, leaves, stability), strict=True):
                both = first.add_(second)
                leaf.grad = both if leaf.grad is None else leaf.grad.add_(both)

    return plain(p, job)


def pcr(p: Problem, *, updates: int = 1, **options: Any) -> Way:
    """PCR with these options, so many updates a call."""

    @contextmanager
    def bound() -> Iterator[Callable[[], None]]:
        method = PCR(p.model, **options)

        def job() -> None:
            for _ in range(updates):
                p.model.zero_grad(set_to_none=True)
                for rows in p.parts:
                    logp = p.logp(rows)
                    method.accumulate_cotangents(logp, *p.cotangents(logp, rows), group_ids=p.group_ids[rows])
                method.resolve()

        yield job
        method.remove()

    return bound


def plain(p: Problem, job: Callable[[], None]) -> Way:
    """A way that needs nothing but gradients that are not there yet."""

    @contextmanager
    def bound() -> Iterator[Callable[[], None]]:
        def run() -> None:
            p.model.zero_grad(set_to_none=True)
            job()

        yield run

    return bound
