"""PCR bound to a torch model: accumulate micro-batches, resolve, step any optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pcr_core
from pcr_core import Rule
from pcr_core.rules import require_rule
from pcr_core.statistics import Strata
from pcr_torch.accumulated import Accumulated
from pcr_torch.baseline import Baseline
from pcr_torch.blocks import Granularity, Selector, describe_blocks, select_blocks
from pcr_torch.distributed import sharded_modules, uncompiled, unwrap
from pcr_torch.every import Every
from pcr_torch.kernels import WORKSPACE
from pcr_torch.meter import Meter
from pcr_torch.paths import Norms, Paths
from pcr_torch.statistics import BlockSums
from pcr_torch.step import Step
from pcr_torch.temporal import TemporalFilter


class PCR(Step):
    """Resolves the plasticity and the stability gradient of a model into `.grad`.

    On several processes gradients are means over the ranks, as with DDP and FSDP: each rank's `loss.backward()` becomes
    `accumulate`, with the same loss, and `resolve`, after which all ranks hold the same report and update. A group may
    be spread over ranks as long as each of them holds two or more of its responses. Wrap or shard first, then make PCR.

    Args:
        model: a torch module. Layers that hold block parameters get their `forward` wrapped until `remove()`; outside
            `accumulate` they behave as before. In DistributedDataParallel: bound to its module; DDP's own reduction is
            off until `remove()`, `resolve` does it (DDP's communication hooks and broadcast of buffers do not run).
            Under `fully_shard`: gradients of block weights are reduce-scattered one at a time where they arise, and
            `.grad` is a DTensor like the parameter.
        blocks: "mlp", "all", a regular expression on parameter names, or a callable, see `select_blocks`.
        granularity: a block per "tensor", "module", "layer" or "global".
        rule: any `pcr_core.Rule`; `pcr_core.PCR()` by default.
        strata: "group": scatter within groups; "batch": within each micro-batch, allows groups of one response.
        norms: how per-response norms are measured. "fast" measures them in the two backward passes, in linear layers;
            "loop" runs one backward pass per response and stream. "auto" is "fast" for every block parameter for which
            it is right (a plain linear layer, used once, whose rows the autograd graph shows to be those of the
            responses) and the loop for the others alone, which a log message and `path` tell. "fast" trusts that
            activations (n, tokens, features) are those of the n responses, in their order, where the graph does not
            tell.
        noise_every: measure the noise of the gradients in every K-th step; 0 for never. A rule that needs the noise
            (`pcr_core.needs_noise`) gets it in every step. For the others None is every 10th, and never where "auto"
            would take the loop. In the steps without, both gradients come from ordinary automatic differentiation of
            any model, and the report holds None for the noise.
        every: with K > 1 only every K-th step takes two backward passes and measures. The steps between take one, of
            the two streams weighted as last measured, at the cost of an ordinary update. That is exact in form only
            where one pair of weights serves all that is trained: one block that holds every trainable parameter
            (granularity="global", blocks="all"; or LoRA in the MLP modules with blocks="mlp").
        baseline: shift advantages by this share, in (0, 1], of what is optimal for the variance of P, estimated from
            the measured norms of responses' gradients (docs/baseline.md). Half of it takes away three quarters of what
            all of it does, and learned better. None for GRPO's own advantages. Needs the noise in every K-th step;
            losses are made of `shifted` advantages, see there.
        baseline_memory: in [0, 1), weight of past measurements against the last one.
        workspace: numbers of per-response gradients held at once on an accelerator without Triton. With Triton none is
            in memory; a CPU holds a small tile of one.
        process_group: for plain copies of a model on several processes: the ranks to average over.

    Raises:
        ValueError: blocks match nothing, norms="fast" with parameters outside plain linear layers, norms="loop" of a
            sharded model, every > 1 where it is not exact, a `noise_every` that leaves the rule without noise, or a
            wrapper that is not supported, with the reason.

    Example:
        Two steps of two micro-batches, each one prompt with two responses.

        >>> import torch, pcr_core
        >>> from pcr_torch import PCR
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
        >>> method = PCR(model, blocks="weight", rule=pcr_core.PCR(alpha="snr"))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        >>> def logp_of(prompts, actions):                                              # (responses, tokens)
        ...     return model(prompts).log_softmax(-1).gather(-1, actions).squeeze(-1)
        >>> ids, mask = torch.tensor([0, 0]), torch.ones(2, 3, dtype=torch.bool)
        >>> advantages = pcr_core.group_advantages(torch.tensor([1.0, 0.0]), ids)
        >>> for step in range(2):
        ...     optimizer.zero_grad()
        ...     for part in range(2):
        ...         prompts, actions = torch.randn(2, 3, 4), torch.randint(5, (2, 3, 1))
        ...         logp = logp_of(prompts, actions)
        ...         old, reference = logp.detach(), logp.detach() - 0.1
        ...         objective = pcr_core.grpo_objective(
        ...             logp, old, reference, advantages, mask, beta=0.04, normalizer=4  # responses in the whole batch
        ...         )
        ...         method.accumulate(logp, objective, group_ids=ids)
        ...     report = method.resolve()
        ...     optimizer.step()
        >>> [block.name for block in report.blocks], report.finite
        (['0.weight', '2.weight'], True)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        blocks: Selector = "mlp",
        granularity: Granularity = "tensor",
        rule: Rule = pcr_core.PCR(),
        strata: Strata = "group",
        norms: Norms = "auto",
        noise_every: int | None = None,
        every: int = 1,
        baseline: float | None = None,
        baseline_memory: float = 0.9,
        workspace: int = WORKSPACE,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        require_rule(rule)
        for name, value, options in (("strata", strata, Strata), ("norms", norms, Norms)):
            if value not in get_args(options):
                raise ValueError(f"{name}: expected one of {get_args(options)}, got {value!r}")
        if isinstance(workspace, bool) or not isinstance(workspace, int) or workspace < 1:
            raise ValueError(f"workspace: expected a positive number of elements, got {workspace!r}")
        self.model, self._ranks = unwrap(model, process_group)
        outer = uncompiled(model)
        self._ddp = outer if isinstance(outer, DistributedDataParallel) else None
        self.rule = rule
        self.strata = strata
        self._meter = Meter.of(rule, noise_every, baseline=baseline is not None)
        self._baseline = None if baseline is None else Baseline(baseline, baseline_memory)
        self._selector = blocks
        self.blocks = select_blocks(self.model, blocks, granularity)
        named = dict(self.model.named_parameters())
        self._parameters = {name: named[name] for block in self.blocks for name in block.parameters}
        self._sharded = self._ranks is not None and self._ranks.sharded
        self._between = Every(every, self.model, self.blocks, self._parameters, rule)
        self._paths = Paths(
            self.model,
            self._parameters,
            norms=norms,
            meter=self._meter,
            workspace=workspace,
            ranks=self._ranks if self._sharded else None,
        )
        self._sums = BlockSums.over(self.blocks, self._parameters, self._ranks)
        self._filter = TemporalFilter(self._sums)
        ignored = set() if self._ddp is None else self._ddp.parameters_to_ignore
        self._averaged = [p for name, p in named.items() if p.requires_grad and name not in ignored]
        self._fsdp = sharded_modules(self.model) if self._sharded else []
        self._accumulated = Accumulated(self._parameters, self._sums)
        self._watched = False  # whether functions that overwrite what they saved were looked for
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = self._ddp.require_forward_param_sync = False
        self._probe()

    def remove(self) -> None:
        """Restore the `forward` of the model's layers. The object cannot be used afterwards."""
        self._paths.probe(False)
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = self._ddp.require_forward_param_sync = True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold: the temporal prior, the baseline, and with every > 1 the last weights.

        Of a sharded model the means are DTensors like its parameters, as `torch.distributed.checkpoint` wants them.
        """
        self._accumulated.refuse_torn()
        if self._accumulated.microbatches:
            raise RuntimeError("state_dict() between accumulate() and resolve(): resolve or discard first")
        return {
            "prior": self._filter.state_dict(),
            "last": self._between.state_dict(),
            "noise": self._meter.state_dict(),
            "baseline": None if self._baseline is None else self._baseline.state_dict(),
            "blocks": [block.name for block in self.blocks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError if it belongs to other blocks.

        Means may be whole tensors too, for any number of processes; DTensors have to be sharded as the model is.
        """
        names = [block.name for block in self.blocks]
        if list(state["blocks"]) != names:
            raise ValueError(
                f"state: it belongs to {len(state['blocks'])} other blocks (first {state['blocks'][:1]}), "
                f"this model has {len(names)} (first {names[:1]}); build PCR with the same blocks and granularity"
            )
        self.discard()
        self._filter.load_state_dict(state["prior"])
        self._between.load_state_dict(state.get("last"))
        if "noise" in state:
            self._meter.load_state_dict(state["noise"])
        if self._baseline is not None and state.get("baseline") is not None:
            self._baseline.load_state_dict(state["baseline"])
        self._probe()

    @property
    def path(self) -> dict[str, str]:
        """How the noise of each block parameter is measured: "fast", or "loop" with the reason, as last decided."""
        return self._paths.by_parameter()

    def describe(self) -> str:
        """A table of the model's parameters: which are in blocks, and why others are not; see `describe_blocks`."""
        return describe_blocks(self.model, self._selector)
