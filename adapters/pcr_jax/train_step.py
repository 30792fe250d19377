"""One compiled program from a rollout batch to new parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array

import pcr_core
from pcr_core import Objective, Rule
from pcr_core.objective import Importance, Normalization, batch_normalizer
from pcr_jax.blocks import Blocks, Granularity, Selector, select_blocks
from pcr_jax.pullback import LogpFn, Norms, pullback
from pcr_jax.records import register
from pcr_jax.resolve import Report, resolve


@dataclass(frozen=True)
class Rollouts:
    """Scored responses, those of a prompt next to each other; a pytree.

    Attributes:
        inputs: what logp_fn reads, any pytree of arrays with one row a response, such as tokens.
        logp_old: (n, T) log-probabilities under the policy that sampled them.
        logp_ref: (n, T) under the reference policy.
        advantages: (n,), of `pcr_core.group_advantages`.
        mask: (n, T) boolean, which entries are response tokens.
    """

    inputs: Any
    logp_old: Array
    logp_ref: Array
    advantages: Array
    mask: Array


@dataclass(frozen=True)
class TrainState:
    """All that a checkpoint has to hold; a pytree. `step` is () int32."""

    params: Any
    optimizer: Any
    step: Array


@dataclass(frozen=True)
class StepReport:
    """Of one step, taken before the update; arrays of shape () but for `resolution`, which is per block."""

    plasticity_loss: Array
    stability_loss: Array
    kl: Array
    clip_fraction: Array
    resolution: Report


for _record in (Rollouts, TrainState, StepReport):
    register(_record)


def init_state(params: Any, optimizer: Any) -> TrainState:
    """The state before the first step. `params` are copied, since steps take the memory of the state they are given."""
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


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
    norms: Norms = "auto",
    microbatch: int | None = None,
) -> Callable[[TrainState, Rollouts], tuple[TrainState, StepReport]]:
    """A jitted `step(state, rollouts) -> (state, report)`, which compiles once for each shape of a batch.

    The state that is given to it is donated: its arrays cannot be used afterwards.

    Args:
        logp_fn: (params, rows of `Rollouts.inputs`) -> (rows, T), see `pullback`.
        optimizer: any `optax.GradientTransformation`. It sees the resolved update; what accumulates or splits gradients
            itself (MultiSteps) comes too late for the statistics: use larger batches and `microbatch`.
        group_size: responses a prompt.
        beta: KL coefficient, >= 0.
        rule: any `pcr_core.Rule`, not with TemporalPrior.
        blocks, granularity: see `select_blocks`.
        clip, normalization, importance: see `pcr_core.grpo_objective`. Tokens are counted over the whole batch.
        norms: see `pullback`.
        microbatch: responses in one forward pass of the fast path, whole groups; one group by default.

    Raises:
        ValueError, TypeError: naming the argument, here or when a batch of a new shape is traced.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from pcr_jax import dense
        >>> def logp_fn(params, x):
        ...     return jax.nn.log_softmax(dense(x, params["up"]))[..., 0]
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
    if not callable(getattr(optimizer, "update", None)):
        raise TypeError(f"optimizer: expected an optax.GradientTransformation, got {type(optimizer).__name__}")
    if normalization not in get_args(Normalization):
        raise ValueError(f"normalization: expected one of {get_args(Normalization)}, got {normalization!r}")
    if microbatch is not None and (microbatch < group_size or microbatch % group_size):
        raise ValueError(f"microbatch: expected whole groups of {group_size} responses, got {microbatch}")

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
        )

    def step(state: TrainState, rollouts: Rollouts) -> tuple[TrainState, StepReport]:
        if not isinstance(rollouts, Rollouts):
            raise TypeError(f"rollouts: expected pcr_jax.Rollouts, got {type(rollouts).__name__}")
        chosen = blocks if isinstance(blocks, Blocks) else select_blocks(state.params, blocks, granularity)
        normalizer = batch_normalizer((rollouts.mask != 0).astype(jnp.float32), normalization)
        pulled = pullback(
            lambda params, rows: logp_fn(params, rows.inputs),
            state.params,
            rollouts,
            lambda logp, rows: objective(logp, rows, normalizer),
            blocks=chosen,
            group_size=group_size,
            norms=norms,
            groups_at_once=1 if microbatch is None else microbatch // group_size,
        )
        update, resolution = resolve(pulled.plasticity, pulled.stability, pulled.scatter(), rule, blocks=chosen)
        update = jax.tree.map(lambda u, x: u.astype(x.dtype), update, state.params)
        change, inner = optimizer.update(update, state.optimizer, state.params)
        params = jax.tree.map(lambda x, dx: (x + dx).astype(x.dtype), state.params, change)
        whole = objective(pulled.logp, rollouts, normalizer)
        report = StepReport(
            jnp.sum(whole.plasticity_loss), jnp.sum(whole.stability_loss), whole.kl, whole.clip_fraction, resolution
        )
        return TrainState(params, inner, state.step + 1), report

    compiled: Callable[[TrainState, Rollouts], tuple[TrainState, StepReport]] = jax.jit(step, donate_argnums=(0,))
    return compiled
