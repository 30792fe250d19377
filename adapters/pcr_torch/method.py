"""PCR bound to a torch model: accumulate micro-batches, resolve, step any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import pcr_core
from pcr_core import BlockStatistics, Objective, Rule, Scatter, TemporalPrior
from pcr_core.statistics import Strata
from pcr_torch.blocks import Granularity, Selector, select_blocks
from pcr_torch.combine import add_combination, gradient_products
from pcr_torch.distributed import average, like, local, split, unwrap
from pcr_torch.probe import Recorder
from pcr_torch.pullback import Pulled, backward_others, per_response, total_dtype, wide_dtype
from pcr_torch.report import Report

Norms = Literal["auto", "fast", "loop"]
_STREAMS = ("plasticity", "stability")
_NOTHING = "resolve() before accumulate(): there are no gradients to resolve"


class PCR:
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
        norms: how per-response norms are had. "fast" measures them in the backward pass of linear layers; "loop" runs
            one backward pass per response and stream; "auto" is "fast" where every block parameter sits in a plain
            linear layer, else "loop".
        process_group: for plain copies of a model on several processes: the ranks to average over.

    Raises:
        ValueError: blocks match nothing, norms="fast" with parameters outside plain linear layers, norms="loop" of a
            sharded model, or a wrapper that is not supported, with the reason.

    Example:
        A policy with two tokens' worth of freedom; two prompts, two responses each.

        >>> import torch, pcr_core
        >>> from pcr_torch import PCR
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
        >>> method = PCR(model, blocks="weight", rule=pcr_core.PCR(alpha="snr"))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        >>> prompts, actions = torch.randn(4, 3, 4), torch.randint(5, (4, 3, 1))
        >>> logp = model(prompts).log_softmax(-1).gather(-1, actions).squeeze(-1)      # (responses, tokens)
        >>> group_ids = torch.tensor([0, 0, 1, 1])
        >>> advantages = pcr_core.group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), group_ids)
        >>> reference = logp.detach() - 0.1
        >>> mask = torch.ones(4, 3, dtype=torch.bool)
        >>> objective = pcr_core.grpo_objective(logp, logp.detach(), reference, advantages, mask, beta=0.04)
        >>> method.accumulate(logp, objective, group_ids=group_ids)
        >>> report = method.resolve()
        >>> optimizer.step()
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
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not callable(rule):
            raise TypeError(f"rule: expected a pcr_core rule such as pcr_core.PCR(), got {rule!r}")
        for name, value, options in (("strata", strata, Strata), ("norms", norms, Norms)):
            if value not in get_args(options):
                raise ValueError(f"{name}: expected one of {get_args(options)}, got {value!r}")
        self.model, self._ranks = unwrap(model, process_group)
        self._ddp = model if isinstance(model, DistributedDataParallel) else None
        self.rule = rule
        self.strata = strata
        self.blocks = select_blocks(self.model, blocks, granularity)
        named = dict(self.model.named_parameters())
        self._parameters = {name: named[name] for block in self.blocks for name in block.parameters}
        self._others = [p for name, p in named.items() if name not in self._parameters]
        self._sharded = self._ranks is not None and self._ranks.sharded
        recorder = Recorder(self.model, self._parameters)
        if norms == "fast" and recorder.uncovered:
            raise ValueError(
                f"norms='fast' measures plain linear layers only, and {recorder.uncovered[0]} is in none, or tied "
                f"({len(recorder.uncovered)} such parameters); use norms='loop' or other blocks"
            )
        if self._sharded and (norms == "loop" or recorder.uncovered):
            raise ValueError(
                "norms='loop' differentiates by whole weights, which a sharded model does not have; use norms='fast' "
                f"and blocks in plain linear layers (outside of them: {list(recorder.uncovered[:3])}), or no sharding"
            )
        self._recorder = None if norms == "loop" or recorder.uncovered else recorder
        if self._recorder is not None:
            self._recorder.install()
        self.norms: Literal["fast", "loop"] = "loop" if self._recorder is None else "fast"
        index = {name: b for b, block in enumerate(self.blocks) for name in block.parameters}
        ignored = set() if self._ddp is None else self._ddp.parameters_to_ignore
        self._averaged = [p for name, p in named.items() if p.requires_grad and name not in ignored]
        self._block_of = torch.tensor([index[name] for name in self._parameters])
        self._totals: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._scatter: Scatter[Tensor] | None = None
        self._prior: dict[str, Any] | None = None
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = self._ddp.require_forward_param_sync = False

    def accumulate(self, logp: Tensor, objective: Objective[Tensor], *, group_ids: Tensor) -> None:
        """Both streams of one micro-batch: two backward passes over logp's graph, which is freed.

        Gradients of parameters outside the blocks are added to their `.grad`; the blocks' streams are kept apart until
        `resolve`.

        Args:
            logp: (n, T) token log-probabilities with their graph.
            objective: `pcr_core.grpo_objective` of these; its normalisation must be that of the whole batch.
            group_ids: (n,) integers, the prompt of each response.

        Raises:
            ValueError: shapes that do not match, a group of one response with strata="group", a block's parameter that
                was frozen meanwhile, or what the fast path cannot measure (docs/supported.md).
            TypeError: arguments that are not tensors of the right kind.
        """
        if not isinstance(objective, Objective):
            raise TypeError(f"objective: expected a pcr_core.Objective, got {type(objective).__name__}")
        self.accumulate_cotangents(
            logp, objective.plasticity_cotangent, objective.stability_cotangent, group_ids=group_ids
        )

    def accumulate_cotangents(self, logp: Tensor, plasticity: Tensor, stability: Tensor, *, group_ids: Tensor) -> None:
        """`accumulate` for a loss of your own: both (n, T) derivatives with respect to logp."""
        self._pull((0, 1), logp, (plasticity, stability), group_ids)

    def accumulate_plasticity(self, logp: Tensor, cotangent: Tensor, *, group_ids: Tensor) -> None:
        """The plasticity stream alone, from its own forward pass; `cotangent` (n, T) is d loss/d logp."""
        self._pull((0,), logp, (cotangent,), group_ids)

    def accumulate_stability(self, logp: Tensor, cotangent: Tensor, *, group_ids: Tensor) -> None:
        """The stability stream alone, such as a loss on replayed or pretraining data, beta included.

        Sequences take the place of responses, and what they were sampled from (a data set, a prompt) that of groups.
        Streams of different forward passes are taken to have independent noise: their covariance is 0.
        """
        self._pull((1,), logp, (cotangent,), group_ids)

    def resolve(self) -> Report:
        """Decide each block's weights, add a P + b S to `.grad` of its parameters, and start afresh.

        Like a backward pass it adds to a `.grad` that is there, so gradients of further losses are kept: zero them once
        a step, as always. A block whose gradients are not finite gets a non-finite update and is named in the report.

        On several processes a collective call.

        Raises:
            RuntimeError: nothing was accumulated.
        """
        if self._ranks is not None and not self._sharded:
            self._average()
        elif self._scatter is None:
            raise RuntimeError(_NOTHING)
        statistics = self._statistics(self._totals, self._scatter or self._no_scatter())
        if isinstance(self.rule, pcr_core.PCR) and isinstance(self.rule.prior, TemporalPrior):
            weights = self._filter(self.rule, statistics)
        else:
            weights = self.rule(statistics)
        a, b = weights.plasticity.tolist(), weights.stability.tolist()
        plasticity, stability = self._totals
        for k, (name, parameter) in enumerate(self._parameters.items()):
            block = int(self._block_of[k])
            add_combination(parameter, plasticity.pop(name, None), stability.pop(name, None), a[block], b[block])
        self._totals, self._scatter = ({}, {}), None
        return Report(self.blocks, weights, statistics)

    def discard(self) -> None:
        """Forget what was accumulated since the last `resolve`."""
        self._totals, self._scatter = ({}, {}), None

    def remove(self) -> None:
        """Give the model's layers their own forward back. The object cannot be used afterwards."""
        if self._recorder is not None:
            self._recorder.remove()
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = self._ddp.require_forward_param_sync = True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold: the temporal prior's means and variances (empty for other priors).

        Of a sharded model the means are DTensors like its parameters, as `torch.distributed.checkpoint` wants them.
        """
        if self._totals[0] or self._totals[1]:
            raise RuntimeError("state_dict() between accumulate() and resolve(): resolve or discard first")
        return {"prior": self._with_means(like), "blocks": [block.name for block in self.blocks]}

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
        self._prior = state["prior"]
        self._prior = self._with_means(split)

    def _with_means(self, change: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any] | None:
        """The prior's state with change(mean, parameter) for each mean."""
        if self._prior is None:
            return None
        return {
            stream: {**kept, "mean": {name: change(m, self._parameters[name]) for name, m in kept["mean"].items()}}
            for stream, kept in self._prior.items()
        }

    def _pull(self, streams: tuple[int, ...], logp: Tensor, cotangents: tuple[Tensor, ...], group_ids: Tensor) -> None:
        ids = _check_batch(logp, cotangents, group_ids, self.strata)
        self._refuse_replaced()
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                raise ValueError(
                    f"{name} is in a block and was frozen after PCR(model) was made; make PCR(model) again"
                )
        strata: list[list[int]] = [[] for _ in range(int(ids.max()) + 1)]
        for row, q in enumerate(ids.tolist()):
            strata[q].append(row)
        cotangents = tuple(c.detach() for c in cotangents)
        if self._recorder is not None:
            pulled = self._recorder.pull(logp, cotangents, strata)
        else:
            pulled = per_response(logp, cotangents, self._parameters, strata)
            backward_others(logp, cotangents, self._others)
        for stream, totals in zip(streams, pulled.totals, strict=True):
            mine = self._totals[stream]
            for name, total in totals.items():
                mine[name] = mine[name].add_(total) if name in mine else total
        scatter = self._micro_scatter(streams, pulled, ids)
        self._scatter = scatter if self._scatter is None else pcr_core.merge(self._scatter, scatter)

    def _micro_scatter(self, streams: tuple[int, ...], pulled: Pulled, ids: Tensor) -> Scatter[Tensor]:
        """Scatter per block of one micro-batch."""
        response = self._per_block(pulled.response.cpu())
        stratum = self._per_block(pulled.stratum.cpu())
        nothing = torch.zeros(len(self.blocks), dtype=response.dtype)
        variances = [nothing, nothing]
        for pair, stream in enumerate(streams):
            variances[stream] = pcr_core.stratified_variance(response[pair], stratum[pair], ids)
        shared = len(streams) == 2
        covariance = pcr_core.stratified_covariance(response[2], stratum[2], ids) if shared else nothing
        return Scatter(variances[0], variances[1], covariance)

    def _no_scatter(self) -> Scatter[Tensor]:
        """Of a rank that accumulated nothing."""
        nothing = torch.zeros(len(self.blocks), dtype=torch.float64)
        return Scatter(nothing, nothing, nothing)

    def _per_block(self, per_parameter: Tensor) -> Tensor:
        """(..., parameters) -> (..., blocks), summed."""
        out = torch.zeros(*per_parameter.shape[:-1], len(self.blocks), dtype=per_parameter.dtype)
        return out.index_add_(-1, self._block_of, per_parameter)

    def _average(self) -> None:
        """Totals and gradients become means over ranks: what some lack is zero there, what all lack stays absent."""
        assert self._ranks is not None
        held = [[name in totals for name in self._parameters] for totals in self._totals]
        graded = [parameter.grad is not None for parameter in self._averaged]
        anywhere = self._ranks.sum(torch.tensor([self._scatter is not None, *held[0], *held[1], *graded]).double())
        accumulated, *present = (anywhere > 0).tolist()
        if not accumulated:
            raise RuntimeError(_NOTHING)
        flags, tensors = iter(present), []
        for totals in self._totals:
            for name, parameter in self._parameters.items():
                if next(flags):
                    if name not in totals:
                        totals[name] = torch.zeros_like(parameter, dtype=total_dtype(parameter))
                    tensors.append(totals[name])
        for parameter in self._averaged:
            if next(flags):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                tensors.append(parameter.grad)
        average(tensors, self._ranks)

    def _refuse_replaced(self) -> None:
        for name, parameter in self._parameters.items():
            owner, _, attribute = name.rpartition(".")
            now = getattr(self.model.get_submodule(owner), attribute, None)
            if now is not parameter and (isinstance(now, DTensor) or not self._sharded):
                raise ValueError(
                    f"{name} is not the parameter that PCR(model) was made with; sharding, moving or loading the model "
                    "replaced it. Make PCR(model) after that, and before the forward pass"
                )

    def _statistics(
        self,
        totals: tuple[dict[str, Tensor], dict[str, Tensor]],
        scatter: Scatter[Tensor],
        *,
        merged: bool = False,
    ) -> BlockStatistics[Tensor]:
        """Of the whole batch; `merged`: the scatter is that of all ranks already, not of this one."""
        products, size = self._products(totals)
        noise = torch.stack([scatter.plasticity_var, scatter.stability_var, scatter.covariance]).double()
        if self._ranks is not None:
            sums = self._ranks.sum(torch.cat([products, noise]))
            products, noise = sums[:3], noise if merged else sums[3:] / self._ranks.world**2
        return BlockStatistics(
            plasticity_sq=products[0],
            stability_sq=products[1],
            dot=products[2],
            plasticity_var=noise[0],
            stability_var=noise[1],
            covariance=noise[2],
            size=size,
        )

    def _products(self, totals: tuple[dict[str, Tensor], dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Inner products (3, blocks) of the streams' totals, of them what this rank has to count; sizes (blocks,)."""
        p, s = totals
        device = next(iter(self._parameters.values())).device
        rows = []
        for k, (name, parameter) in enumerate(self._parameters.items()):
            share = 1.0 if self._ranks is None else self._ranks.share(k, parameter)
            products = torch.zeros(3, dtype=wide_dtype(parameter.device), device=parameter.device)
            if share and name in p and name in s:
                products = share * gradient_products(p[name], s[name])
            elif share and (name in p or name in s):
                alone = 0 if name in p else 1
                products[alone] = share * gradient_products((p, s)[alone][name], (p, s)[alone][name])[0]
            rows.append(products.to(device))
        sums = self._per_block(torch.stack(rows).to("cpu", torch.float64).T.contiguous())
        sizes = torch.tensor([parameter.numel() for parameter in self._parameters.values()], dtype=torch.float64)
        return sums, self._per_block(sizes)

    def _filter(self, rule: pcr_core.PCR, statistics: BlockStatistics[Tensor]) -> pcr_core.Weights[Tensor]:
        """Replace the totals by the temporal prior's posterior means, and give the weights of those."""
        unknown = torch.full((len(self.blocks),), math.inf, dtype=torch.float64)
        previous = self._prior or {stream: {"mean": {}, "variance": unknown} for stream in _STREAMS}
        posteriors = rule.posteriors(
            statistics, (previous["plasticity"]["variance"], previous["stability"]["variance"])
        )
        # a step that is not finite is no evidence: its update is NaN, and the filter of that block waits
        finite = pcr_core.GRPO()(statistics).finite
        state: dict[str, Any] = {}
        for stream, totals, posterior in zip(_STREAMS, self._totals, posteriors, strict=True):
            gains = posterior.gain.tolist()
            means: dict[str, Tensor] = {}
            for k, (name, parameter) in enumerate(self._parameters.items()):
                gain = gains[int(self._block_of[k])]
                mean = previous[stream]["mean"].get(name)
                if mean is None:
                    mean = torch.zeros_like(local(parameter), dtype=total_dtype(parameter))
                mean = mean.to(parameter.device)
                filtered = mean * (1 - gain)
                if name in totals:
                    filtered.add_(totals[name], alpha=gain)
                means[name] = filtered.clone() if bool(finite[self._block_of[k]]) else mean
                totals[name] = filtered
            variance = torch.where(finite, posterior.variance, previous[stream]["variance"])
            state[stream] = {"mean": means, "variance": variance}
        self._prior = state
        scatter = Scatter(posteriors[0].variance, posteriors[1].variance, statistics.covariance)
        return rule.project(self._statistics(self._totals, scatter, merged=True))


def _check_batch(logp: Tensor, cotangents: tuple[Tensor, ...], group_ids: Tensor, strata: Strata) -> Tensor:
    """Stratum of each response, 0 to q - 1, on the CPU."""
    if not isinstance(logp, Tensor) or logp.ndim != 2:
        raise ValueError(f"logp: expected a tensor (responses, tokens), got {getattr(logp, 'shape', type(logp))}")
    if not logp.requires_grad:
        raise ValueError(
            "logp: it has no graph; compute it with gradients enabled, from a model with trainable weights"
        )
    for cotangent in cotangents:
        if not isinstance(cotangent, Tensor):
            raise TypeError(f"cotangent: expected a torch tensor, got {type(cotangent).__name__}")
        if cotangent.shape != logp.shape:
            raise ValueError(f"cotangent: expected logp's shape {tuple(logp.shape)}, got {tuple(cotangent.shape)}")
        if cotangent.device != logp.device or cotangent.dtype != logp.dtype:
            raise ValueError(
                f"cotangent: expected {logp.dtype} on {logp.device} as logp, got {cotangent.dtype}, {cotangent.device}"
            )
    ids = torch.as_tensor(group_ids)
    if ids.dtype.is_floating_point or ids.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"group_ids: expected integers, got {ids.dtype}")
    if ids.shape != (logp.shape[0],):
        raise ValueError(f"group_ids: expected one id a response, shape ({logp.shape[0]},), got {tuple(ids.shape)}")
    if strata == "batch":
        ids = torch.zeros_like(ids)
    _, index, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    if bool((counts < 2).any()):
        what = "micro-batch" if strata == "batch" else f"group {ids[index == int(counts.argmin())][0].item()}"
        raise ValueError(
            f"group_ids: {what} has one response, which carries no information on the variance. Give every prompt two "
            "or more responses in a micro-batch (a larger one, or whole groups in each), or ask for strata='batch'"
        )
    positions: Tensor = index
    return positions.cpu()
