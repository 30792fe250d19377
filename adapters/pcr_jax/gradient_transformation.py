"""`resolve` as the first link of an optax chain, for loops that call an optax optimizer themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import pcr_core
from pcr_core import BlockStatistics, PriorState, Rule, Scatter
from pcr_jax.blocks import Blocks, Granularity, Selector, select_blocks
from pcr_jax.products import wide_dtype
from pcr_jax.resolve import Report, resolve
from pcr_jax.temporal import init_prior, is_temporal


class ResolvingState(NamedTuple):
    """`report` of the last update (NaN before the first), without its prior, which is beside it."""

    prior: PriorState[Any] | None
    report: Report


def resolving(
    rule: Rule = pcr_core.PCR(), blocks: Blocks | Selector = "mlp", granularity: Granularity = "tensor"
) -> Any:
    """An `optax.GradientTransformationExtraArgs`: plasticity gradients in, the resolved update out.

    `update(plasticity, state, params, stability=, statistics=)` takes P, S and their Scatter of the whole batch, as
    `pullback` returns them. It must come first: what stands before it in a chain, such as clipping, changes P and
    neither S nor the statistics, which nothing can detect. These wrappers around it are refused:

    - `MultiSteps`, which adds up P and keeps S and the statistics of the last micro-batch only. Add up all three
      (`pcr_core.merge` for the Scatter), or use `make_train_step(microbatch=)`.
    - `masked` and `partition`, which hide leaves of P and not of S, and leave P alone where P + S belongs. Put them
      after it: `optax.chain(resolving(...), optax.masked(...))`.

    Args:
        rule: any `pcr_core.Rule`.
        blocks: see `select_blocks`.
        granularity: the same.

    Raises:
        ImportError: optax is not installed.
        TypeError, ValueError: from `init` and `update`, naming the argument.

    Example:
        >>> import jax.numpy as jnp, optax, pcr_core
        >>> optimizer = optax.chain(resolving(blocks="all"), optax.sgd(1.0))
        >>> params = {"w": jnp.zeros(2)}
        >>> state = optimizer.init(params)
        >>> p, s = {"w": jnp.asarray([4.0, 2.0])}, {"w": jnp.asarray([-1.0, 0.0])}
        >>> noise = pcr_core.Scatter(jnp.asarray([3.0]), jnp.asarray([0.0]), jnp.asarray([0.0]))
        >>> update, state = optimizer.update(p, state, params, stability=s, statistics=noise)
        >>> update["w"].tolist(), state[0].report.weights.alpha.tolist()
        ([-1.0, -2.0], [0.5])
    """
    try:
        import optax
    except ImportError as error:
        raise ImportError("resolving needs optax: pip install 'pcr-grpo[jax]'") from error

    def masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    def chosen(params: Any) -> Blocks:
        if any(masked(x) for x in jax.tree.leaves(params, is_leaf=masked)):
            raise ValueError(
                "resolving: some leaves are masked, and these would go on with P alone. Put it outside optax.masked "
                "and optax.partition: optax.chain(resolving(...), optax.masked(...))"
            )
        return blocks if isinstance(blocks, Blocks) else select_blocks(params, blocks, granularity)

    def init(params: Any) -> ResolvingState:
        of = chosen(params)
        prior = init_prior(params, of) if is_temporal(rule) else None
        unknown = jnp.full((len(of.names),), jnp.nan, wide_dtype())
        statistics = BlockStatistics(*(unknown,) * 7)
        # every rule gives the same record
        return ResolvingState(prior, Report(pcr_core.PCR(alpha="variance")(statistics), statistics, of))

    def update(
        updates: Any,
        state: ResolvingState,
        params: Any = None,
        *,
        stability: Any = None,
        statistics: Scatter[Array] | BlockStatistics[Array] | None = None,
        **ignored: Any,
    ) -> tuple[Any, ResolvingState]:
        if stability is None or statistics is None:
            name = "stability" if stability is None else "statistics"
            raise TypeError(
                f"{name}: update(plasticity, state, params, stability=, statistics=) needs it; make_train_step is "
                "given optimizers without resolving"
            )
        of = chosen(updates)
        traces = _traces(updates)
        if traces and not traces & _traces(stability):
            raise ValueError(
                "stability: computed outside the transformation in which updates were, as optax.MultiSteps does, which "
                "adds up updates and keeps the last stability and statistics only. Add up all three before update, or "
                "pass stability through the same lax.cond or lax.scan as updates"
            )
        resolved, report = resolve(updates, stability, statistics, rule, blocks=of, prior=state.prior)
        return resolved, ResolvingState(report.prior, Report(report.weights, report.statistics, of))

    return optax.GradientTransformationExtraArgs(init, update)


def _traces(tree: Any) -> set[int]:
    """Which traces the tree's tracers belong to; none where arrays are concrete."""
    leaves = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.core.Tracer))
    return {id(getattr(x, "_trace", None)) for x in leaves}
