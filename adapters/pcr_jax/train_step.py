"""One compiled program from a rollout batch to new parameters."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

import pcr_core
from pcr_core import BaselineSums, Objective, PriorState, Rule, Scatter, needs_noise
from pcr_core._numbers import is_number
from pcr_core.objective import KL, Importance, Normalization, batch_normalizer, check_options
from pcr_core.rules import require_rule
from pcr_jax.baseline import Shift, check_baseline, measured, no_sums, weights
from pcr_jax.blocks import Blocks, Granularity, Selector, select_blocks
from pcr_jax.checks import check_floating, check_mask, check_width
from pcr_jax.optimizers import apply_optimizer, check_optimizer, init_optimizer
from pcr_jax.pullback import LogpFn, Norms, Path, pullback
from pcr_jax.records import register
from pcr_jax.resolve import Report, as_written, resolve
from pcr_jax.sharding import Layout
from pcr_jax.temporal import init_prior, is_temporal


@dataclass(frozen=True)
class Rollouts:
    """Scored responses, those of a prompt next to each other; a pytree.

    Attributes:
        inputs: what logp_fn reads, any pytree of arrays with one row a response, such as tokens.
        logp_old: (n, T) log-probabilities under the policy that sampled them.
        logp_ref: (n, T) under the reference policy.
        advantages: (n,), of `pcr_core.group_advantages`.
        mask: (n, T) boolean, or 0 and 1: which entries are response tokens.
        present: (n,) boolean, where groups are of unequal size: False for rows that only fill up a group. All are
            responses by default. A group of one response makes the blocks NaN and `weights.finite` False.
    """

    inputs: Any
    logp_old: Array
    logp_ref: Array
    advantages: Array
    mask: Array
    present: Array | None = None


@dataclass(frozen=True)
class TrainState:
    """All that a checkpoint has to hold; a pytree.

    `step` is () int32; `prior` is TemporalPrior's, `baseline` that of make_train_step(baseline=), else None.
    """

    params: Any
    optimizer: Any
    step: Array
    prior: PriorState[Any] | None = None
    baseline: BaselineSums[Array] | None = None


@dataclass(frozen=True)
class StepReport:
    """Of one step, taken before the update; arrays of shape () but for `resolution`, which is per block.

    `resolution.prior` is None: it is in the new state. `path` says how the gradients were had, see `Pulled`;
    with "autograd" the noise was not measured, and is None in `resolution`. It is part of the pytree's structure.
    `baseline` is what the shift of advantages did, None without one.
    """

    plasticity_loss: Array
    stability_loss: Array
    kl: Array
    clip_fraction: Array
    resolution: Report
    path: Path = "loop"
    baseline: Shift | None = None


register(Rollouts)
register(TrainState)
register(StepReport, static=("path",))
DEFAULT_NOISE_EVERY = 10


@dataclass
class Measuring:
    """In which steps the noise is measured: every K-th by `state.step`, 0 for never, so a resumed run goes on alike.

    `optional`: nobody asked for it, so that the first trace may set `stopped` where it would take the loop.
    """

    every: int
    optional: bool
    stopped: bool = False
    last: tuple[Any, int] | None = None  # the step of the last new state, as an array and as a number

    @classmethod
    def of(cls, rule: Rule, every: int | None, *, baseline: bool = False) -> Measuring:
        if every is not None and (isinstance(every, bool) or not isinstance(every, numbers.Integral) or every < 0):
            raise ValueError(f"noise_every: expected an integer >= 0 (0 for never), or None, got {every!r}")
        if baseline and every == 0:
            raise ValueError(
                "noise_every=0: the baseline is estimated from the norms that are measured with the noise; leave it "
                "out, or measure in every K-th step"
            )
        if not needs_noise(rule):
            steps = DEFAULT_NOISE_EVERY if every is None else int(every)
            return cls(steps, optional=every is None and not baseline)
        if every not in (None, 1):
            raise ValueError(
                f"noise_every={every}: {rule!r} reads the noise of the gradients in every step; use noise_every=1, or "
                "a rule that does without, such as pcr_core.PCR() with a number as alpha"
            )
        return cls(1, optional=False)

    def due(self, step: Any) -> bool:
        if self.every <= 1:
            return self.every == 1
        if isinstance(step, jax.core.Tracer):  # inside another program, which can be of one kind only
            return False
        return self.number(step) % self.every == 0

    def number(self, step: Any) -> int:
        # of a state that came from here it is known; to read it would wait for the last step to end
        return self.last[1] if self.last is not None and self.last[0] is step else int(step)


@dataclass(frozen=True)
class TrainStep:
    """`step(state, rollouts) -> (state, report)`.

    Attributes:
        compiled: the same of `jax.jit`, without the check of dtypes, as it is where the noise is measured.
        plain: the same where it is not; without `noise_every` one of both is all that runs.
    """

    compiled: Any
    plain: Any
    _measuring: Measuring = field(repr=False)

    def __call__(self, state: TrainState, rollouts: Rollouts) -> tuple[TrainState, StepReport]:
        check_width(state, "state")
        check_width(rollouts, "rollouts")
        check_mask(rollouts)
        before = getattr(state, "step", None)
        # where the first trace found that it would take the loop, its program measures nothing, and no other is needed
        program = self.compiled if self._measuring.stopped or self._measuring.due(before) else self.plain
        counted = self._measuring.every > 1 and not isinstance(before, jax.core.Tracer)
        number = self._measuring.number(before) if counted else 0
        result: tuple[TrainState, StepReport] = program(state, rollouts)
        if counted:
            self._measuring.last = result[0].step, number + 1
        return result

    def lower(self, state: TrainState, rollouts: Rollouts) -> Any:
        """For `.compile()`, whose text and memory analysis say what XLA made of it; nothing runs."""
        return (self.compiled if self._measuring.every else self.plain).lower(state, rollouts)


def init_state(
    params: Any,
    optimizer: Any,
    rule: Rule = pcr_core.PCR(),
    *,
    blocks: Blocks | Selector = "mlp",
    granularity: Granularity = "tensor",
    baseline: bool = False,
) -> TrainState:
    """The state before the first step.

    `params` is any pytree of floating arrays: dicts, nnx states, or a Module that is one. They are copied, since steps
    take the memory of the state they are given. Where they lie on a mesh, so does all of the state: the optimizer's
    moments like their parameters, counters replicated. `rule`, `blocks` and `granularity` are those of
    `make_train_step`; only TemporalPrior asks for them. `baseline`: whether the step has one.
    """
    check_floating(params, "params")
    # of a dtype that is meant: a weakly typed array would become another in the first step, which compiles anew
    params = jax.tree.map(lambda x: jnp.array(x, dtype=jnp.result_type(x), copy=True), params)
    prior = None
    if is_temporal(rule):
        prior = init_prior(params, blocks if isinstance(blocks, Blocks) else select_blocks(params, blocks, granularity))
    known = no_sums() if baseline else None
    state = TrainState(params, init_optimizer(optimizer, params), jnp.zeros((), jnp.int32), prior, known)
    meshes = {x.sharding.mesh for x in jax.tree.leaves(params) if isinstance(x.sharding, NamedSharding)}
    if not meshes:
        return state
    everywhere = NamedSharding(meshes.pop(), PartitionSpec())
    placed: TrainState = jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, everywhere), state
    )
    return placed


def make_train_step(
    logp_fn: LogpFn,
    optimizer: Any,
    *,
    group_size: int,
    beta: float,
    rule: Rule = pcr_core.PCR(),
    blocks: Blocks | Selector = "mlp",
    granularity: Granularity = "tensor",
    clip: tuple[float, float] = (0.2, 0.2),
    normalization: Normalization = "grpo",
    importance: Importance = "token",
    kl: KL = "k3",
    norms: Norms = "auto",
    microbatch: int | None = None,
    shardings: TrainState | None = None,
    data_axis: str | Sequence[str] = "data",
    noise_every: int | None = None,
    baseline: float | None = None,
    baseline_memory: float = 0.9,
) -> TrainStep:
    """A jitted `step(state, rollouts) -> (state, report)`, which compiles once for each shape of a batch.

    Rules that do without the gradients' noise (`pcr_core.needs_noise`) take two pullbacks of any model in most steps; a
    step that measures the noise is a program of its own.

    The state that is given to it is donated: its arrays cannot be used afterwards.

    Args:
        logp_fn: (params, rows of `Rollouts.inputs`) -> (rows, T), see `pullback`. Rows may come one at a time or by
            whole groups: a key for dropout that it closes over gives each of them, or each group, the same mask, so
            take a key a response as part of the inputs.
        optimizer: any `optax.GradientTransformation`. It sees the resolved update, and both losses' sum as `value`.
            What accumulates gradients (MultiSteps) comes too late and is refused: use larger batches and `microbatch`.
        group_size: responses a prompt; of smaller groups see `Rollouts.present`.
        beta: KL coefficient, >= 0.
        rule: any `pcr_core.Rule`; TemporalPrior needs `init_state(params, optimizer, rule, blocks=blocks)`.
        blocks: see `select_blocks`.
        granularity: the same.
        clip: see `pcr_core.grpo_objective`.
        normalization: the same; tokens are counted over the whole batch.
        importance: the same.
        kl: the same; "k3_ratio" is what TRL does.
        norms: see `pullback`.
        microbatch: responses in one forward pass, whole groups, but for the loop; one group by default.
        shardings: for several devices, `jax.tree.map(lambda x: x.sharding, state)`, with all of the state on one mesh.
            The new state is laid out alike. Without it XLA gathers the whole batch on every device.
        data_axis: the mesh axis, or axes, that rollouts are split over, by whole groups; () where they are not.
            Parameters split over these as well (FSDP) are gathered for every pass.
        noise_every: measure the noise in every K-th step, counted by `state.step`; 0 for never. A rule that needs it
            gets it in every step. For the others None is every 10th, and never where norms="auto" would take the loop.
            In the steps without, the report holds None for the noise, and its `path` is "autograd".
        baseline: shift advantages by this share, in (0, 1], of what is optimal for the variance of P, estimated from
            the measured norms of responses' gradients (docs/baseline.md); 0.5 was best where it was tried. None for
            the advantages as they are. Needs the noise in every K-th step, and `init_state(..., baseline=True)`.
        baseline_memory: in [0, 1), weight of past measurements against the last one.

    Raises:
        ValueError, TypeError: naming the argument, here or when a batch of a new shape is traced.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> def logp_fn(params, x):
        ...     return jax.nn.log_softmax(x @ params["up"])[..., 0]
        >>> optimizer = optax.adam(0.1)
        >>> step = make_train_step(logp_fn, optimizer, group_size=2, beta=0.1, blocks="all")
        >>> state = init_state({"up": jnp.eye(3)}, optimizer)
        >>> x, old = jnp.arange(24.0).reshape(4, 2, 3) / 24, jnp.full((4, 2), -1.0)
        >>> mask = jnp.ones((4, 2), dtype=bool)
        >>> rollouts = Rollouts(x, old, old - 0.1, jnp.asarray([1.0, -1.0, 1.0, -1.0]), mask)
        >>> state, report = step(state, rollouts)
        >>> int(state.step), report.resolution.blocks.names
        (1, ('up',))
    """
    require_rule(rule)
    check_optimizer(optimizer)
    if not is_number(beta):
        check_width(beta, "beta")
    beta, clip = check_options(beta, clip, normalization, importance, kl)
    for name, value in (("group_size", group_size), ("microbatch", microbatch)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1):
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if microbatch is not None and microbatch % group_size:
        raise ValueError(f"microbatch: expected whole groups of {group_size} responses, got {microbatch}")

    if shardings is not None and not isinstance(shardings, TrainState):
        raise TypeError(f"shardings: expected a TrainState of NamedSharding, got {type(shardings).__name__}")
    layout = None if shardings is None else Layout.of(shardings.params, data_axis)

    def objective(logp: Array, rows: Rollouts, normalizer: Any) -> Objective[Array]:
        return pcr_core.grpo_objective(
            logp,
            rows.logp_old,
            rows.logp_ref,
            rows.advantages,
            rows.mask,
            beta=beta,
            clip=clip,
            normalization=normalization,
            importance=importance,
            normalizer=normalizer,
            kl=kl,
        )

    check_baseline(baseline, baseline_memory)
    measuring = Measuring.of(rule, noise_every, baseline=baseline is not None)

    def step(state: TrainState, rollouts: Rollouts, *, noise: bool) -> tuple[TrainState, StepReport]:
        path: Path = "loop"
        if not isinstance(rollouts, Rollouts):
            raise TypeError(f"rollouts: expected pcr_jax.Rollouts, got {type(rollouts).__name__}")
        chosen = blocks if isinstance(blocks, Blocks) else select_blocks(state.params, blocks, granularity)
        if is_temporal(rule) != (state.prior is not None):
            raise ValueError(
                "state: TemporalPrior keeps state, other rules none; make it with init_state(params, optimizer, rule, "
                "blocks=...) of this step's rule"
            )
        if (baseline is None) != (state.baseline is None):
            raise ValueError(
                "state: make it with init_state(..., baseline=True) for a step with a baseline, and without for others"
            )
        if layout is not None:
            _check_layout(layout, shardings, state, rollouts, group_size)
            rollouts = layout.split(rollouts)
        if rollouts.present is not None:
            there = rollouts.present
            advantages = jnp.where(there, rollouts.advantages, 0)  # whatever the rows that fill up hold
            mask = jnp.where(there[:, None], rollouts.mask, jnp.zeros_like(rollouts.mask))
            rollouts = replace(rollouts, mask=mask, advantages=advantages)
        shift, weight = jnp.zeros(()), jnp.zeros(rollouts.advantages.shape)
        if baseline is not None and state.baseline is not None:
            shift = baseline * pcr_core.estimate_baseline(state.baseline).shift
            weight = weights(rollouts.mask, rollouts.present, normalization)
            lowered = rollouts.advantages - (shift * weight).astype(rollouts.advantages.dtype)
            rollouts = replace(rollouts, advantages=lowered)
        normalizer = batch_normalizer((rollouts.mask != 0).astype(jnp.float32), normalization)
        n = rollouts.mask.shape[0]
        present = n if rollouts.present is None else jnp.sum(rollouts.present)
        if normalization in ("grpo", "dr_grpo"):  # these count responses
            normalizer = normalizer // n * present

        def pull(
            params: Any, rollouts: Rollouts, normalizer: Any
        ) -> tuple[Any, Any, Array, Scatter[Array] | None, Array | None]:
            nonlocal path
            pulled = pullback(
                lambda params, rows: logp_fn(params, rows.inputs),
                params,
                rollouts,
                lambda logp, rows: objective(logp, rows, normalizer),
                blocks=chosen,
                group_size=group_size,
                norms=norms,
                groups_at_once=1 if microbatch is None else microbatch // group_size,
                layout=layout,
                noise="cheap" if noise and measuring.optional else noise,
            )
            path = pulled.path
            if noise and path == "autograd":
                measuring.stopped = True
            if pulled.response is None:
                return pulled.plasticity, pulled.stability, pulled.logp, None, None
            scatter = pulled.scatter(rollouts.present)
            scatter = scatter if layout is None else layout.sum(scatter)
            return pulled.plasticity, pulled.stability, pulled.logp, scatter, jnp.sum(pulled.response[0], axis=1)

        if layout is not None:
            held = jax.tree.unflatten(
                jax.tree.structure(state.params), [layout.spec(k, layout.data) for k in range(len(layout.specs))]
            )
            rows, whole = layout.rollouts.spec, PartitionSpec()
            pull = layout.by_shard(pull, (held, rows, whole), (held, held, rows, whole, rows))
        plasticity, stability, logp, scatter, response_sq = pull(state.params, rollouts, normalizer)
        update, resolution = resolve(
            plasticity, stability, scatter, rule, blocks=chosen, prior=state.prior, layout=layout
        )
        update = jax.tree.map(lambda u, x: u.astype(x.dtype), update, state.params)
        resolution = as_written(resolution, update)
        lost = objective(logp, rollouts, normalizer)
        loss = jnp.sum(lost.plasticity_loss) + jnp.sum(lost.stability_loss)
        change, inner = apply_optimizer(optimizer, update, state.optimizer, state.params, loss)
        params = jax.tree.map(lambda x, dx: (x + dx).astype(x.dtype), state.params, change)
        report = StepReport(
            jnp.sum(lost.plasticity_loss),
            jnp.sum(lost.stability_loss),
            lost.kl,
            lost.clip_fraction * (n / present if importance == "sequence" else 1.0),
            replace(resolution, prior=None),
            path,
        )
        known = state.baseline
        if known is not None:
            reduction = None
            if response_sq is not None:
                given = rollouts.advantages
                known, reduction = measured(known, response_sq, given, weight, shift, group_size, baseline_memory)
            report = replace(report, baseline=Shift(shift, reduction))
        return TrainState(params, inner, state.step + 1, resolution.prior, known), report

    placed: dict[str, Any] = {}
    if layout is not None:
        placed = {
            "in_shardings": (None, layout.rollouts),
            "out_shardings": (shardings, layout.replicated),
        }
    compiled, plain = (jax.jit(partial(step, noise=noise), donate_argnums=(0,), **placed) for noise in (True, False))
    return TrainStep(compiled, plain, measuring)


def _check_layout(layout: Layout, shardings: Any, state: TrainState, rollouts: Rollouts, group_size: int) -> None:
    if jax.tree.structure(shardings) != jax.tree.structure(state):
        raise ValueError("shardings: not a tree like the state; take jax.tree.map(lambda x: x.sharding, state)")
    n = rollouts.mask.shape[0]
    if n % (layout.shards * group_size):
        raise ValueError(
            f"rollouts: {n} responses over {layout.shards} data shards are not whole groups of {group_size} on each; a "
            "group that is split over devices is not supported"
        )
