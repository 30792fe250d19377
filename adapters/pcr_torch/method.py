"""PCR bound to a torch model: accumulate micro-batches, resolve, step any optimizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pcr_core
from pcr_core import FlatPrior, Objective, Rule, Scatter, TemporalPrior
from pcr_core.rules import require_rule
from pcr_core.statistics import Strata
from pcr_torch.baseline import Applied, Baseline
from pcr_torch.batch import check_batch, strata_of
from pcr_torch.blocks import Granularity, Selector, describe_blocks, select_blocks
from pcr_torch.combine import longest, of_sum
from pcr_torch.distributed import average, local, sharded_modules, uncompiled, unwrap
from pcr_torch.kernels import WORKSPACE
from pcr_torch.meter import Meter
from pcr_torch.overwritten import watch_saved
from pcr_torch.parameters import check_parameters
from pcr_torch.pullback import Pulled, Total, backward_others, per_response, total_dtype
from pcr_torch.recorder import Recorder
from pcr_torch.report import Report
from pcr_torch.statistics import BlockSums, Totals
from pcr_torch.temporal import TemporalFilter
from pcr_torch.totals import part, pull_totals
from pcr_torch.update import Part, add_update

Norms = Literal["auto", "fast", "loop"]
_log = logging.getLogger("pcr_torch")
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
            one backward pass per response and stream; "auto" is "fast" for every block parameter of which it is right
            (a plain linear layer, used once, whose rows the autograd graph shows to be those of the responses) and the
            loop for the others alone, which a log message and `path` tell. "fast" trusts that activations (n, tokens,
            features) are those of the n responses, in their order, where the graph does not tell.
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
        self._selector, self._granularity = blocks, granularity
        self.blocks = select_blocks(self.model, blocks, granularity)
        named = dict(self.model.named_parameters())
        self._parameters = {name: named[name] for block in self.blocks for name in block.parameters}
        self._others = [p for name, p in named.items() if name not in self._parameters]
        self._sharded = self._ranks is not None and self._ranks.sharded
        self._every = every
        self._last: Report | None = None  # with every > 1: what was measured last, and how many steps ago
        self._age = 0
        if every != 1:
            self._refuse_inexact(every)
        recorder = Recorder(self.model, self._parameters, workspace)
        if norms == "fast" and recorder.uncovered:
            name, why = next(iter(recorder.uncovered.items()))
            raise ValueError(
                f"norms='fast' measures plain linear layers only; {name}: {why} ({len(recorder.uncovered)} such "
                "parameters). Use norms='auto', which takes the loop for these alone, or other blocks"
            )
        if (
            self._sharded
            and self._meter.every
            and (norms == "loop" or (recorder.uncovered and not self._meter.optional))
        ):
            raise ValueError(
                "norms='loop' differentiates by whole weights, which a sharded model does not have; use norms='fast' "
                f"and blocks in plain linear layers (outside of them: {list(recorder.uncovered)[:3]}), or no sharding"
            )
        self._trusting = norms == "fast"
        self._recorder = None if norms == "loop" or len(recorder.uncovered) == len(self._parameters) else recorder
        self._looped: dict[str, str] = {} if norms == "loop" else dict(recorder.uncovered)
        if self._looped and self._meter.optional:
            self._meter.stop(next(f"{name}: {why}" for name, why in self._looped.items()))
        elif self._looped and self._meter.every:
            self._tell(self._looped)
        self._sums = BlockSums.over(self.blocks, self._parameters, self._ranks)
        self._filter = TemporalFilter(self._sums)
        ignored = set() if self._ddp is None else self._ddp.parameters_to_ignore
        self._averaged = [p for name, p in named.items() if p.requires_grad and name not in ignored]
        self._fsdp = sharded_modules(self.model) if self._sharded else []
        self._totals: Totals = ({}, {})
        self._joined: int | None = None  # in the place of which stream's totals those of the sum are
        self._scatter: Scatter[Tensor] | None = None
        self._microbatches = 0
        self._skipped = False  # whether the noise of one of them was not measured
        self._torn = False  # whether a micro-batch ended within its backward passes
        self._watched = False  # whether functions that overwrite what they saved were looked for
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = self._ddp.require_forward_param_sync = False
        self._probe()

    def accumulate(
        self,
        logp: Tensor,
        objective: Objective[Tensor],
        *,
        group_ids: Tensor,
        advantages: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Both streams of one micro-batch, in two backward passes over logp's graph, which is freed.

        With every > 1 one pass, unless the step is `measuring`. Where the loop measures the noise, many.

        Gradients of parameters outside the blocks are added to their `.grad`; the blocks' streams are kept apart until
        `resolve`.

        Args:
            logp: (n, T) token log-probabilities with their graph.
            objective: `pcr_core.grpo_objective` of these; its normalisation must be that of the whole batch.
            group_ids: (n,) integers, the prompt of each response.
            advantages: (n,) as the objective was given them, with a baseline; see `shifted`.
            weight: (n,) as `shifted` was given it.

        Raises:
            ValueError: shapes that do not match, a group of one response with strata="group", a block's parameter that
                was frozen meanwhile, or what the fast path cannot measure (docs/supported.md).
            TypeError: arguments that are not tensors of the right kind.
            RuntimeError: an earlier call ended within its backward passes; see `discard`.
        """
        if not isinstance(objective, Objective):
            raise TypeError(f"objective: expected a pcr_core.Objective, got {type(objective).__name__}")
        cotangents = objective.plasticity_cotangent, objective.stability_cotangent
        self.accumulate_cotangents(logp, *cotangents, group_ids=group_ids, advantages=advantages, weight=weight)

    def accumulate_cotangents(
        self,
        logp: Tensor,
        plasticity: Tensor,
        stability: Tensor,
        *,
        group_ids: Tensor,
        advantages: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """`accumulate` for a loss of your own: both (n, T) derivatives with respect to logp."""
        applied = None if self._baseline is None else self._baseline.check(logp, advantages, weight)
        self._pull((0, 1), logp, (plasticity, stability), group_ids, applied)

    def accumulate_plasticity(
        self,
        logp: Tensor,
        cotangent: Tensor,
        *,
        group_ids: Tensor,
        advantages: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """The plasticity stream alone, from its own forward pass; `cotangent` (n, T) is d loss/d logp."""
        applied = None if self._baseline is None else self._baseline.check(logp, advantages, weight)
        self._pull((0,), logp, (cotangent,), group_ids, applied)

    @property
    def shift(self) -> float:
        """The baseline b of this step; 0 without one."""
        return 0.0 if self._baseline is None else self._baseline.shift

    def shifted(self, advantages: Tensor, weight: Tensor | None = None) -> Tensor:
        """Advantages (n,) less b times `weight`, of which to make this step's loss; as they are without a baseline.

        The expected gradient stays as it is where the weight times what the loss divides by is the same for all
        responses: 1 (the default) for dr_grpo, and nearly for dapo and bnpo; for grpo the response's length over a
        constant length.

        Args:
            advantages: (n,), after any division by a standard deviation.
            weight: (n,).

        Example:
            >>> import torch, pcr_core
            >>> from pcr_torch import PCR
            >>> _ = torch.manual_seed(0)
            >>> policy = torch.nn.Linear(4, 5)
            >>> method = PCR(policy, blocks="weight", baseline=0.5)
            >>> optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
            >>> ids, mask = torch.arange(32) // 8, torch.ones(32, 1, dtype=torch.bool)
            >>> reference = torch.full((32, 1), -1.6)
            >>> for step in range(2):
            ...     optimizer.zero_grad()
            ...     log_policy = policy(torch.randn(4, 4)[ids]).log_softmax(-1)
            ...     actions = log_policy.exp().multinomial(1)
            ...     logp = log_policy.gather(1, actions)
            ...     applied = method.shifted(pcr_core.group_advantages((actions[:, 0] == 0).float(), ids))
            ...     objective = pcr_core.grpo_objective(
            ...         logp, logp.detach(), reference, applied, mask, beta=0.04, normalization="dr_grpo"
            ...     )
            ...     method.accumulate(logp, objective, group_ids=ids, advantages=applied)
            ...     report = method.resolve()
            ...     optimizer.step()
            >>> report.baseline.reduction is None  # with noise_every=None every tenth step is measured
            True
        """
        return advantages if self._baseline is None else self._baseline.shifted(advantages, weight)

    def accumulate_stability(self, logp: Tensor, cotangent: Tensor, *, group_ids: Tensor) -> None:
        """The stability stream alone, such as a loss on replayed or pretraining data, beta included.

        Sequences take the place of responses, and what they were sampled from (a data set, a prompt) that of groups.
        Streams of different forward passes are taken to have independent noise: their covariance is 0.
        """
        self._pull((1,), logp, (cotangent,), group_ids, None)

    def resolve(self) -> Report:
        """Decide each block's weights, add a P + b S to `.grad` of its parameters, and start afresh.

        Like a backward pass it adds to a `.grad` that is there, so gradients of further losses are kept: zero them once
        a step, as always. A block whose gradients are not finite gets a non-finite update and is named in the report.

        On several processes a collective call.

        Raises:
            RuntimeError: nothing was accumulated, or a micro-batch ended within its backward passes.
        """
        self._refuse_torn()
        if self._ranks is not None and not self._sharded:
            self._average()
        elif not self._microbatches:
            raise RuntimeError(_NOTHING)
        if not self.measuring:
            assert self._last is not None
            self._age += 1
            self._microbatches = 0
            self._probe()
            finite = self._last.weights.finite & self._gradients_finite()  # there is one block
            shift = None if self._baseline is None else self._baseline.finish(self._ranks, measured=False)
            weights = replace(self._last.weights, finite=finite)
            return replace(self._last, weights=weights, measured=False, baseline=shift)
        joined, noise = self._joined, self._measures_noise
        scatter = (self._scatter or self._sums.no_scatter()) if noise else None
        statistics = self._sums.statistics(self._totals, scatter, joined=joined)
        if isinstance(self.rule, pcr_core.PCR) and isinstance(self.rule.prior, TemporalPrior):
            weights = self._filter.weights(self.rule, statistics, self._totals)
            bounds = torch.full_like(statistics.size, math.inf)  # of the means that the filter put in the totals' place
        else:
            weights = self.rule(statistics)
            bounds = longest(weights, statistics)
        (a, b), upto = of_sum(weights, joined), bounds.tolist()
        plasticity, stability = self._totals
        block_of = self._sums.block_of.tolist()
        held = add_update(
            Part(p, plasticity.pop(name, None), stability.pop(name, None), a[block], b[block], upto[block])
            for block, (name, p) in zip(block_of, self._parameters.items())
        )
        broken = torch.zeros_like(bounds)
        broken[[block for block, each in zip(block_of, held, strict=True) if not each]] = 1
        if self._ranks is not None and self._sharded:  # each has seen its own part
            broken = self._ranks.sum(broken)
        weights = replace(weights, finite=weights.finite & (broken == 0))
        shift = None if self._baseline is None else self._baseline.finish(self._ranks, measured=noise)
        path = self.norms if noise else "autograd"
        report = Report(self.blocks, weights, statistics, path=path, baseline=shift)
        if self._every > 1:
            self._last, self._age = report, 0
        self._meter.step(measured=noise)
        self.discard()
        self._probe()
        return report

    @property
    def _measures_noise(self) -> bool:
        """Whether the noise of this step is measured; of all ranks alike."""
        return self._meter.due and not self._skipped

    def _probe(self) -> None:
        """Probes for the steps that measure; in the others the model's layers are its own."""
        if self._recorder is not None:
            (self._recorder.install if self.measuring and self._meter.due else self._recorder.remove)()

    def _gradients_finite(self) -> bool:
        gradients = [local(p.grad) for p in self._parameters.values() if p.grad is not None]
        # a sum is read faster than each number, and says no more often
        finite = bool(torch.stack([g.sum() for g in gradients]).isfinite().all()) if gradients else True
        finite = finite or all(bool(g.isfinite().all()) for g in gradients)
        broken = torch.tensor([0.0 if finite else 1.0], dtype=torch.float64)
        return not bool(broken if self._ranks is None else self._ranks.sum(broken))

    @property
    def measuring(self) -> bool:
        """Whether this step takes two backward passes and measures; false in the steps between, with every > 1."""
        last = self._last
        if last is None or self._age >= self._every - 1 or not last.finite:
            return True
        return not last.statistics.stability_sq.all()  # weights were measured without a KL gradient: there was none yet

    @property
    def accumulated(self) -> bool:
        """Whether microbatches wait for `resolve`."""
        return self._torn or self._microbatches > 0

    def discard(self) -> None:
        """Forget what was accumulated since the last `resolve`, but for what is in `.grad`: zero that as well.

        After an error within `accumulate` (out of memory, say) the step goes on with nothing else: a part of that
        micro-batch is in the gradients.
        """
        self._totals, self._joined, self._scatter = ({}, {}), None, None
        self._microbatches, self._skipped, self._torn = 0, False, False
        if self._baseline is not None:
            self._baseline.discard()

    def remove(self) -> None:
        """Give the model's layers their own forward back. The object cannot be used afterwards."""
        if self._recorder is not None:
            self._recorder.remove()
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = self._ddp.require_forward_param_sync = True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold: the temporal prior, the baseline, and with every > 1 the last weights.

        Of a sharded model the means are DTensors like its parameters, as `torch.distributed.checkpoint` wants them.
        """
        self._refuse_torn()
        if self._microbatches:
            raise RuntimeError("state_dict() between accumulate() and resolve(): resolve or discard first")
        last = None if self._last is None else {"age": self._age, **self._last.state_dict()}
        return {
            "prior": self._filter.state_dict(),
            "last": last,
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
        last = state.get("last") if self._every > 1 else None
        self._last = None if last is None else Report.from_state(self.blocks, last)
        self._age = 0 if last is None else int(last["age"])
        if "noise" in state:
            self._meter.load_state_dict(state["noise"])
        if self._baseline is not None and state.get("baseline") is not None:
            self._baseline.load_state_dict(state["baseline"])
        self._probe()

    def _pull(
        self,
        streams: tuple[int, ...],
        logp: Tensor,
        cotangents: tuple[Tensor, ...],
        group_ids: Tensor,
        applied: Applied | None,
    ) -> None:
        self._refuse_torn()
        group_ids = check_batch(logp, cotangents, group_ids)
        noise = self.measuring and self._measures_noise
        check_parameters(self.model, self._parameters, fast=noise and self._recorder is not None, sharded=self._sharded)
        cotangents = tuple(c.detach() for c in cotangents)
        strata = self._measurable(logp, group_ids) if noise else None
        self._skipped |= noise and strata is None
        self._torn = True
        if self.measuring and not self._watched and logp.grad_fn is not None:
            watch_saved(logp)
            self._watched = True
        if not self.measuring:
            self._pull_weighted(streams, logp, cotangents)
        elif strata is None:
            self._pull_totals(streams, logp, cotangents)
        else:
            pulled = self._pull_apart(streams, logp, cotangents, strata)
            if self._baseline is not None and applied is not None:
                self._baseline.measure(pulled.response[0].sum(dim=-1), applied, group_ids)
        self._microbatches += 1
        self._torn = False

    def _measurable(self, logp: Tensor, group_ids: Tensor) -> Tensor | None:
        """Stratum of each response, where the noise is to be measured; None where it may be left out, and costs much.

        Raises:
            ValueError: it may not be left out, and cannot be measured.
        """
        why: str | None = None
        ids: Tensor | None = None
        try:
            ids = strata_of(group_ids, self.strata)
        except ValueError as error:
            if not self._meter.optional:
                raise
            why = str(error)
        if self._recorder is not None:
            looped = self._recorder.survey(logp, trusting=self._trusting)
            if self._trusting or not (looped and self._meter.optional):
                self._take_loop(looped)
            elif why is None:
                why = next(f"{name}: {reason}" for name, reason in looped.items())
        late = self._recorder is not None and self._recorder.late
        if self._sharded and self._meter.optional:  # all ranks have to take the same passes
            assert self._ranks is not None
            elsewhere = self._ranks.sum(torch.tensor([why is not None], dtype=torch.float64))
            why = why or ("another process cannot measure it" if bool(elsewhere) else None)
        if why is None:
            return ids
        if not late:  # else the forward pass was before the probes, and the next step will do
            self._meter.stop(why)
            self._skipped = True
        return None

    def _take_loop(self, looped: dict[str, str]) -> None:
        """For block parameters that the fast path cannot measure, with the reason; ValueError where it may not be."""
        if looped and (self._trusting or self._sharded):
            name, why = next(iter(looped.items()))
            raise ValueError(
                f"{name} cannot be measured on the fast path: {why} ({len(looped)} such parameters). "
                + ("Leave it out of the blocks" if self._sharded else "Use norms='auto' or norms='loop'")
            )
        if looped.keys() != self._looped.keys():
            self._tell({name: why for name, why in looped.items() if name not in self._looped})
        self._looped = looped

    def _pull_totals(self, streams: tuple[int, ...], logp: Tensor, cotangents: tuple[Tensor, ...]) -> None:
        """Each stream's gradient into the totals, by automatic differentiation alone."""
        if len(streams) == 1:
            self._part()
        self._joined = pull_totals(
            logp,
            cotangents,
            self._parameters,
            [self._totals[stream] for stream in streams],
            joined=self._joined,
            fresh=not self._microbatches,
            fsdp=self._fsdp,
        )

    def _part(self) -> None:
        """P and S in the totals, where the streams' sum is in the place of one of them."""
        part(self._totals, self._joined)
        self._joined = None

    def _pull_apart(
        self, streams: tuple[int, ...], logp: Tensor, cotangents: tuple[Tensor, ...], ids: Tensor
    ) -> Pulled:
        """Each stream's gradient into the totals, and the scatter of both."""
        self._part()
        strata: list[list[int]] = [[] for _ in range(int(ids.max()) + 1)]
        for row, q in enumerate(ids.tolist()):
            strata[q].append(row)
        totals = [self._totals[stream] for stream in streams]
        if self._recorder is None:
            pulled = per_response(logp, cotangents, self._parameters, strata, totals)
            backward_others(logp, cotangents, self._others)
        else:
            pulled = self._pull_fast(self._recorder, logp, cotangents, strata, totals)
        scatter = self._sums.scatter(streams, pulled, ids)
        self._scatter = scatter if self._scatter is None else pcr_core.merge(self._scatter, scatter)
        return pulled

    def _pull_fast(
        self,
        recorder: Recorder,
        logp: Tensor,
        cotangents: tuple[Tensor, ...],
        strata: list[list[int]],
        totals: list[Total],
    ) -> Pulled:
        """What probes can measure in two backward passes; the loop for the other block parameters alone."""
        alone = {name: p for name, p in self._parameters.items() if name in self._looped}
        kept = [parameter.grad for parameter in alone.values()]
        by_loop = per_response(logp, cotangents, alone, strata, totals) if alone else None
        pulled = recorder.pull(logp, cotangents, strata, totals, skipped=alone)
        if by_loop is not None:
            columns = [k for k, name in enumerate(self._parameters) if name in alone]
            pulled.response[:, :, columns] = by_loop.response
            pulled.stratum[:, :, columns] = by_loop.stratum
        for parameter, gradient in zip(alone.values(), kept, strict=True):
            parameter.grad = gradient  # their streams are in the totals, and the passes of the others added the sum
        return pulled

    def _tell(self, looped: Mapping[str, str]) -> None:
        """Once for each parameter: an update takes a backward pass per response and stream because of it."""
        if looped:
            name, why = next(iter(looped.items()))
            _log.warning(
                "%d of %d block parameters take one backward pass per response and stream, such as %s: %s. "
                "PCR(model).path lists them; leave them out of the blocks for speed",
                len(looped), len(self._parameters), name, why,
            )  # fmt: skip

    @property
    def path(self) -> dict[str, str]:
        """How the noise of each block parameter is measured: "fast", or "loop" with the reason, as last decided."""
        if self._recorder is None and not self._looped:
            return dict.fromkeys(self._parameters, "loop: norms='loop'")
        return {name: f"loop: {self._looped[name]}" if name in self._looped else "fast" for name in self._parameters}

    def describe(self) -> str:
        """A table of the model's parameters: which are in blocks, and why others are not; see `describe_blocks`."""
        return describe_blocks(self.model, self._selector)

    @property
    def norms(self) -> Literal["fast", "loop", "mixed"]:
        """Which ways `path` names."""
        ways = {how.partition(":")[0] for how in self.path.values()}
        return "mixed" if len(ways) > 1 else "loop" if "loop" in ways else "fast"

    def _pull_weighted(self, streams: tuple[int, ...], logp: Tensor, cotangents: tuple[Tensor, ...]) -> None:
        """One backward pass of the streams with the weights of the last measured step."""
        assert self._last is not None
        weights = self._last.weights.plasticity.item(), self._last.weights.stability.item()
        weighted = [weights[stream] * cotangent for stream, cotangent in zip(streams, cotangents, strict=True)]
        torch.autograd.backward(logp, sum(weighted[1:], start=weighted[0]))

    def _refuse_inexact(self, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected an integer >= 1, got {every!r}")
        outside = [
            name for name, p in self.model.named_parameters() if p.requires_grad and name not in self._parameters
        ]
        if len(self.blocks) > 1 or outside:
            what = f"there are {len(self.blocks)} blocks" if len(self.blocks) > 1 else f"{outside[0]} is in no block"
            raise ValueError(
                f"every={every}: one backward pass weights both streams alike for all that is trained, and {what}. Use "
                "one block for every trainable parameter (granularity='global' with blocks='all', or LoRA), or every=1"
            )
        if isinstance(self.rule, pcr_core.PCR) and not isinstance(self.rule.prior, FlatPrior):
            raise ValueError(
                f"every={every}: {type(self.rule.prior).__name__} shrinks each step's streams by that step's noise, "
                "which has to be measured; use FlatPrior()"
            )

    def _average(self) -> None:
        """Totals and gradients become means over ranks: what some lack is zero there, what all lack stays absent."""
        assert self._ranks is not None
        held = [[name in totals for name in self._parameters] for totals in self._totals]
        graded = [parameter.grad is not None for parameter in self._averaged]
        mine = [self._microbatches > 0, self._skipped, self._joined == 0, self._joined == 1, self._joined is None]
        mine[4] &= mine[0]
        anywhere = self._ranks.sum(torch.tensor([*mine, *held[0], *held[1], *graded]).double())
        accumulated, self._skipped, first, second, apart, *present = (anywhere > 0).tolist()
        if not accumulated:
            raise RuntimeError(_NOTHING)
        if first + second + apart > 1:
            self._part()
        elif first or second:  # also of a rank without microbatches
            self._joined = int(second)
        if self._skipped and self._meter.optional and self._meter.every:
            self._meter.stop("another process cannot measure it")
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

    def _refuse_torn(self) -> None:
        if self._torn:
            raise RuntimeError(
                "an earlier accumulate() ended within its backward passes (out of memory, an interrupt, an error in "
                "them), and left a part of that micro-batch in the gradients. Call discard() and zero the gradients, "
                "then take the step's micro-batches again"
            )
