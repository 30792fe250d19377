"""From a policy to the totals of both streams and the inner products of per-response contributions.

One forward and two pullbacks of the map parameters -> logp. Not a `vmap` over the two stacked cotangents: it once gave
wrong numbers, compiled for a CPU; `benchmarks/jax_stacked_cotangents.py` looks for that.

The reference implementation is here: a scan over groups, and in each over its responses, one vjp at a time, so that no
more than three gradients per stream are held. `fast.py` has the same in two pullbacks for all responses together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import Array

import pcr_core
from pcr_core import Objective, Scatter
from pcr_jax.blocks import Blocks, path_name
from pcr_jax.checks import check_blocks, check_floating, check_width
from pcr_jax.products import at_least_float32, block_products
from pcr_jax.records import register
from pcr_jax.sharding import Layout

Norms = Literal["auto", "fast", "loop"]
Path = Literal["fast", "loop", "autograd"]
LogpFn: TypeAlias = Callable[[Any, Any], Array]
Cotangents: TypeAlias = Callable[[Array, Any], tuple[Array, Array] | Objective[Array]]
_log = logging.getLogger("pcr_jax")
_told: set[str] = set()  # reasons for the loop that the log holds


@dataclass(frozen=True)
class Pulled:
    """What one micro-batch contributes; a pytree.

    Attributes:
        plasticity: P, a tree like the parameters; half precision is summed in float32. Outside the blocks it is P + S.
        stability: S; zero outside the blocks.
        logp: (n, T).
        response: (3, n, blocks) |p_i|^2, |s_i|^2 and p_i.s_i of each response; None where not measured.
        stratum: (3, n / group_size, blocks) the same of each group's summed contribution, or None.
        path: how they were had: "fast", "loop", or "autograd" for totals alone. Part of the pytree's structure.
    """

    plasticity: Any
    stability: Any
    logp: Array
    response: Array | None
    stratum: Array | None
    path: Path = "loop"

    def scatter(self, present: Array | None = None) -> Scatter[Array]:
        """Noise of both totals from the scatter within groups; `pcr_core.merge` adds those of micro-batches.

        Args:
            present: (n,) boolean, False for rows that only fill up a smaller group and contribute nothing (masked, or
                with cotangents of zero). A group with none present is left out.

        Raises:
            ValueError: shapes and dtypes, a pullback with noise=False, or a group with one response present (NaN where
                `present` is traced).
        """
        if self.response is None or self.stratum is None:
            raise ValueError(
                "scatter: the noise was not measured (noise=False); give resolve statistics=None, a rule that does "
                "without, or take the pullback with noise=True"
            )
        groups, n = self.stratum.shape[1], self.response.shape[1]
        ids = jnp.repeat(jnp.arange(groups), n // groups)
        response, stratum = self.response, self.stratum
        if present is not None:
            if tuple(present.shape) != (n,) or present.dtype != bool:
                raise ValueError(
                    f"present: expected booleans of shape ({n},), got {present.dtype} of shape {tuple(present.shape)}"
                )
            # what only fills up is a stratum of its own, in which two more rows of zero see to it that none is alone
            ids = jnp.concatenate([jnp.where(present, ids, groups), jnp.full((2,), groups)])
            response, stratum = (jnp.pad(x, ((0, 0), (0, more), (0, 0))) for x, more in ((response, 2), (stratum, 1)))
        return Scatter(
            pcr_core.stratified_variance(response[0], stratum[0], ids),
            pcr_core.stratified_variance(response[1], stratum[1], ids),
            pcr_core.stratified_covariance(response[2], stratum[2], ids),
        )


register(Pulled, static=("path",))


def pullback(
    logp_fn: LogpFn,
    params: Any,
    batch: Any,
    cotangents: Cotangents,
    *,
    blocks: Blocks,
    group_size: int,
    norms: Norms = "auto",
    groups_at_once: int = 1,
    layout: Layout | None = None,
    noise: bool | Literal["cheap"] = True,
) -> Pulled:
    """Totals and inner products of both streams, for `resolve`. Memory does not grow with the number of groups.

    Args:
        logp_fn: (params, rows of the batch) -> (rows, T) token log-probabilities; a response's must not depend on the
            others in the batch.
        params: pytree of floating arrays.
        batch: pytree of arrays with one row a response, the responses of a group next to each other.
        cotangents: (logp, the same rows of the batch) -> the (rows, T) derivatives of both losses with respect to logp,
            or a `pcr_core.Objective` that holds them. It sees some of the rows: give it the normaliser of all of them.
        blocks: of `select_blocks(params)`.
        group_size: responses a prompt, at least 2. XLA's shapes are static, so smaller groups are filled up with rows
            that contribute nothing, see `Pulled.scatter`.
        norms: "fast" measures all responses in two pullbacks, where the block leaves are multiplied as they are, cast,
            transposed or reshaped, at any place of the model, jit, remat and scans included, or are small; "loop" takes
            any model, at a vjp per response and stream; "auto" is "fast" where that can be, else "loop", which the log
            tells once with the reason.
        groups_at_once: groups in one forward pass, but for the loop; must divide their number.
        layout: where `make_train_step` calls it on each data shard: params and batch are that shard's, the totals are
            of all shards and lie like params, and the other attributes are of this shard's responses.
        noise: False for the totals alone, which take two pullbacks of any model, for rules that do without the noise
            (`pcr_core.needs_noise`): `resolve(p, s, None, rule)`. "cheap" measures it
            where that does not take the loop of norms="auto".

    Raises:
        ValueError: rows that are not whole groups, shapes that do not match, or norms="fast" with what it does not
            measure, with the reason.
        TypeError: leaves of params that are not floating.

    Example:
        A policy of two tokens over three words, two prompts and two responses each.

        >>> import jax, jax.numpy as jnp, pcr_core
        >>> from pcr_jax import resolve, select_blocks
        >>> params = {"up": jnp.eye(3)}
        >>> batch = {"x": jnp.arange(24.0).reshape(4, 2, 3) / 24, "advantage": jnp.asarray([1.0, -1.0, 1.0, -1.0])}
        >>> def logp_fn(params, batch):
        ...     return jax.nn.log_softmax(batch["x"] @ params["up"])[..., 0]
        >>> def cotangents(logp, batch):
        ...     plasticity = -batch["advantage"][:, None] + 0 * logp
        ...     return plasticity / 8, 0.01 * logp / 8
        >>> blocks = select_blocks(params, "all")
        >>> pulled = pullback(logp_fn, params, batch, cotangents, blocks=blocks, group_size=2)
        >>> update, report = resolve(pulled.plasticity, pulled.stability, pulled.scatter(), blocks=blocks)
        >>> update["up"].shape, bool(report.weights.finite.all())
        ((3, 3), True)
    """
    from pcr_jax.fast import measure
    from pcr_jax.local_constraints import on_a_shard
    from pcr_jax.totals import pull_totals

    if norms not in get_args(Norms):
        raise ValueError(f"norms: expected one of {get_args(Norms)}, got {norms!r}")
    check_floating(params, "params")
    check_blocks(params, blocks, "params")
    groups = _groups(batch, group_size)
    if isinstance(groups_at_once, bool) or not isinstance(groups_at_once, int) or groups_at_once < 1:
        raise ValueError(f"groups_at_once: expected a positive integer, got {groups_at_once!r}")
    if groups % groups_at_once:
        raise ValueError(f"groups_at_once: {groups_at_once} does not divide the {groups} groups of the batch")
    logp_fn = on_a_shard(logp_fn, layout)
    grouped = jax.tree.map(lambda x: x.reshape(groups, group_size, *x.shape[1:]), batch)
    if not noise:
        return pull_totals(logp_fn, params, grouped, cotangents, groups_at_once, blocks, layout)
    if norms != "loop":
        measured, reason = measure(logp_fn, params, grouped, blocks, layout)
        if measured is not None:
            try:
                return pull_totals(logp_fn, params, grouped, cotangents, groups_at_once, blocks, layout, measured)
            except NotImplementedError as error:  # of an operation without a rule for vmap
                reason = f"the model cannot be vmapped over responses: {error}"
        if norms == "fast":
            raise ValueError(f"norms='fast': {reason}; use norms='loop' or other blocks")
        cheap = noise == "cheap"
        if reason not in _told:
            _told.add(reason)
            what = "is not measured, since the rule does without; measured it" if cheap else "is measured, which"
            _log.info("the noise of the gradients %s takes two pullbacks a response (norms='loop'): %s", what, reason)
        if cheap:
            return pull_totals(logp_fn, params, grouped, cotangents, groups_at_once, blocks, layout)
    return _loop(logp_fn, params, grouped, cotangents, blocks, layout)


def both_cotangents(cotangents: Cotangents, logp: Array, rows: Any) -> tuple[Array, Array]:
    """Checked: two arrays of logp's shape, in its dtype."""
    n = jax.tree.leaves(rows)[0].shape[0]
    if logp.ndim != 2 or logp.shape[0] != n:
        raise ValueError(f"logp_fn: expected shape (rows, T) for {n} rows, got {tuple(logp.shape)}")
    got = cotangents(logp, rows)
    if isinstance(got, Objective):
        got = (got.plasticity_cotangent, got.stability_cotangent)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise TypeError(f"cotangents: expected a pair of arrays or an Objective, got {type(got).__name__}")
    for stream, w in zip(("plasticity", "stability"), got, strict=True):
        if tuple(w.shape) != tuple(logp.shape):
            raise ValueError(f"cotangents: {stream} has shape {tuple(w.shape)}, logp has {tuple(logp.shape)}")
        check_floating(w, f"cotangents: {stream}")
    return got[0].astype(logp.dtype), got[1].astype(logp.dtype)


def zeros_like(leaves: Sequence[Array]) -> list[Array]:
    return [jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in leaves]


def add(sums: Any, parts: Any) -> Any:
    return jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, parts)


def finish(
    structure: Any,
    totals: Any,
    logp: Array,
    response: Array | None,
    stratum: Array | None,
    layout: Layout | None,
    path: Path,
) -> Pulled:
    """From (passes, rows, ...) of the scan."""
    plasticity, stability = totals if layout is None else (layout.total(stream) for stream in totals)
    return Pulled(
        plasticity=jax.tree.unflatten(structure, plasticity),
        stability=jax.tree.unflatten(structure, stability),
        logp=logp.reshape(-1, logp.shape[-1]),
        response=None if response is None else _by_pair(response),
        stratum=None if stratum is None else _by_pair(stratum),
        path=path,
    )


def _by_pair(products: Array) -> Array:
    """(passes, rows, 3, blocks) -> (3, passes * rows, blocks)"""
    return jnp.moveaxis(products.reshape(-1, *products.shape[2:]), 1, 0)


def _loop(
    logp_fn: LogpFn, params: Any, grouped: Any, cotangents: Cotangents, blocks: Blocks, layout: Layout | None
) -> Pulled:
    held, structure = jax.tree.flatten(params)
    axes = () if layout is None else layout.model_axes(blocks.leaves)

    def one_group(totals: Any, rows: Any) -> Any:
        leaves = held if layout is None else layout.gather(held)

        def one_response(sums: Any, row: Any) -> Any:
            rows = jax.tree.map(lambda x: x[None], row)
            logp, pull = jax.vjp(lambda x: logp_fn(jax.tree.unflatten(structure, x), rows), leaves)
            p, s = ([at_least_float32(g) for g in pull(w)[0]] for w in both_cotangents(cotangents, logp, rows))
            return add(sums, (p, s)), (block_products(p, s, blocks, layout, axes), logp[0])

        sums, (response, logp) = jax.lax.scan(one_response, (zeros_like(leaves), zeros_like(leaves)), rows)
        stratum = block_products(sums[0], sums[1], blocks, layout, axes)
        if layout is not None:
            sums = tuple([layout.scatter(k, x) for k, x in enumerate(stream)] for stream in sums)
        return add(totals, sums), (response, stratum[None], logp)

    (p, s), (response, stratum, logp) = jax.lax.scan(one_group, (zeros_like(held), zeros_like(held)), grouped)
    outside = [k for k, block in enumerate(blocks.of_leaf) if block is None]
    for k in outside:
        p[k], s[k] = p[k] + s[k], jnp.zeros_like(s[k])
    totals = p, s
    return finish(structure, totals, logp, response, stratum, layout, "loop")


def _groups(batch: Any, group_size: Any) -> int:
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2:
        raise ValueError(
            f"group_size: expected an integer >= 2, got {group_size!r}; one response tells nothing of the variance"
        )
    rows: int | None = None
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        name = path_name(path) or "the array"
        if getattr(leaf, "ndim", 0) < 1:
            raise ValueError(f"batch: {name} has no axis of responses; close over what is not per response")
        if rows is None:
            rows = int(leaf.shape[0])
        if leaf.shape[0] != rows:
            raise ValueError(f"batch: {name} has {leaf.shape[0]} rows, the first leaf has {rows}")
    check_width(batch, "batch")
    if not rows or rows % group_size:
        raise ValueError(
            f"batch: {rows} rows are not whole groups of {group_size}; fill up smaller groups with masked rows, "
            "and tell by `present`"
        )
    return rows // group_size
