"""Laws 5 to 8: what must not matter - the axes, the order, the units, the split of the work."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np

import pcr_core
from pcr_conformance import enclosure, oracle
from pcr_conformance.adapter import Adapter, arithmetic
from pcr_conformance.cases import Case, Floats, Integers, group_slots
from pcr_conformance.laws.checks import as_seen, close, enclosed, near, same_bits
from pcr_conformance.laws.judging import exact_statistics
from pcr_conformance.rounding import gamma, unit_roundoff
from pcr_conformance.tolerances import errors, update_bounds
from pcr_core import BlockStatistics, Rule, Scatter
from pcr_core.statistics import require_noise


def rotation_goes_through(adapter: Adapter, case: Case, dtype: str, rule: Rule, seed: int) -> None:
    """Law 5: rotating every contribution of a block rotates its update."""
    case = as_seen(adapter, case, dtype)
    q = np.zeros((sum(case.sizes),) * 2)
    rng = np.random.default_rng(seed)
    for block in case.blocks():
        q[block, block] = np.linalg.qr(rng.normal(size=(block.stop - block.start,) * 2))[0]
    turned = as_seen(adapter, case.with_(plasticity=case.plasticity @ q.T, stability=case.stability @ q.T), dtype)
    expected = q @ adapter.resolve(case, rule, dtype).update
    got = adapter.resolve(turned, rule, dtype).update
    unturned = update_bounds(case, rule, arithmetic(adapter), dtype)
    for i, block in enumerate(case.blocks()):
        d, part = block.stop - block.start, q[block, block]
        # the turned numbers are those of a rotation to this relative error: of a product, of q, and of their dtype
        product = gamma(d, unit_roundoff("float64")) * d**0.5
        skew = float(np.linalg.norm(part.T @ part - np.eye(d))) + d * product
        (turned_bound,) = update_bounds(
            turned.with_block(block), rule, arithmetic(adapter), dtype, product + skew + unit_roundoff(dtype)
        )
        back = (product + skew) * float(np.linalg.norm(expected[block]))
        allowed = unturned[i] + turned_bound + back
        near(f"law 5 (rotation), {rule}, block {i}", "update", got[block], expected[block], allowed)


def order_does_not_matter(adapter: Adapter, case: Case, dtype: str, rule: Rule, seed: int) -> None:
    """Law 5: permuting responses and renaming groups changes nothing beyond rounding."""
    case = as_seen(adapter, case, dtype)
    order = np.random.default_rng(seed).permutation(len(case.group_ids))
    renamed = np.unique(case.group_ids, return_inverse=True)[1][order]
    moved = case.with_(plasticity=case.plasticity[order], stability=case.stability[order], group_ids=5 - 3 * renamed)
    allowed = update_bounds(case, rule, arithmetic(adapter), dtype)
    expected, got = (adapter.resolve(c, rule, dtype).update for c in (case, moved))
    for i, block in enumerate(case.blocks()):
        # each of the two is within the bound of the exact update
        near(f"law 5 (order), {rule}, block {i}", "update", got[block], expected[block], 2 * allowed[i])


def scale_goes_through(adapter: Adapter, case: Case, dtype: str, rule: Rule, power: int = 3) -> None:
    """Law 6: t times both streams is t times the update - to the last bit, for t a power of two.

    Scaling S alone changes alpha as v_p/(v_p + t^2 v_s) and leaves the hard projection of P alone.
    """
    case = as_seen(adapter, case, dtype)
    t = 2.0**power
    both = case.with_(plasticity=t * case.plasticity, stability=t * case.stability)
    law = f"law 6 (scale), {rule}"
    base = adapter.resolve(case, rule, dtype)
    same_bits(law, f"update scaled by {t}", adapter.resolve(both, rule, dtype).update, t * base.update)

    louder = case.with_(stability=t * case.stability)
    noise: Any = base.statistics.stability_var
    scaled = replace(base.statistics, stability_var=t * t * noise)
    alpha = adapter.resolve(louder, pcr_core.PCR(alpha="variance"), dtype).weights.alpha
    for i, stats in enumerate(exact_statistics(scaled)):
        exact = float(oracle.retention_complement("variance", stats))
        may = enclosure.retention_complement("variance", enclosure.around(stats, arithmetic(adapter)))
        enclosed(law, f"alpha with S scaled, block {i}", alpha[i], exact, may)
    projected = pcr_core.PCR(alpha=1.0, max_boost=np.inf, update="literal")
    first, second = (adapter.resolve(c, projected, dtype).update for c in (case, louder))
    same_bits(law, "hard projection with S scaled", second, first)


def strata_add_up(adapter: Adapter, case: Case, dtype: str, seed: int) -> None:
    """Law 7: the scatter of any strata is the sum of their scatters, whatever the order of the sum."""
    case = as_seen(adapter, case, dtype)
    rng = np.random.default_rng(seed)
    case = case.with_(group_ids=_finer(case.group_ids, rng))
    slots = group_slots(case.group_ids)
    pieces = [_rows(case, some) for some in slots]
    parts = [_scatter(adapter.statistics(piece, dtype)) for piece in pieces]
    whole = adapter.statistics(case, dtype)
    sums = arithmetic(adapter)
    bounds = [errors(c, sums) for c in (case, *pieces)]
    added = gamma(len(parts), sums.unit)
    left = reduce(pcr_core.merge, parts)
    right = reduce(lambda a, b: pcr_core.merge(b, a), [parts[i] for i in rng.permutation(len(parts))])
    for merged, how in ((left, "in order"), (right, "in another order")):
        for name, field in (("plasticity_var", "vp"), ("stability_var", "vs"), ("covariance", "vps")):
            sizes = sum(np.abs(getattr(part, name)) for part in parts)
            allowed = np.asarray([[getattr(e, field) for e in blocks] for blocks in bounds]).sum(0) + added * sizes
            close(f"law 7 (strata), {how}", name, getattr(merged, name), getattr(whole, name), allowed)


def shards_add_up(adapter: Adapter, case: Case, dtype: str, seed: int) -> None:
    """Law 8: statistics of the shards of one block, added, are those of the block."""
    case = as_seen(adapter, case, dtype)
    d = sum(case.sizes)
    case = case.with_(sizes=(d,))
    if d < 2:
        return
    cut = int(np.random.default_rng(seed).integers(1, d))
    shards = [
        case.with_(plasticity=case.plasticity[:, part], stability=case.stability[:, part], sizes=(size,))
        for part, size in ((slice(0, cut), cut), (slice(cut, d), d - cut))
    ]
    found = [adapter.statistics(shard, dtype) for shard in shards]
    merged, whole = pcr_core.merge(*found), adapter.statistics(case, dtype)
    sums = arithmetic(adapter)
    bounds = [errors(c, sums)[0] for c in (case, *shards)]
    names = ("plasticity_sq", "stability_sq", "dot", "plasticity_var", "stability_var", "covariance")
    for name, field in zip(names, ("p2", "s2", "c", "vp", "vs", "vps")):
        sizes = sum(np.abs(getattr(shard, name)) for shard in found)
        allowed = sum(getattr(bound, field) for bound in bounds) + gamma(2, sums.unit) * sizes
        close("law 8 (shards)", name, getattr(merged, name), getattr(whole, name), allowed)
    same_bits("law 8 (shards)", "size", merged.size, whole.size)


def _scatter(stats: BlockStatistics[Any]) -> Scatter[Floats]:
    return Scatter(*require_noise(stats, "merge"))


def _rows(case: Case, rows: Integers) -> Case:
    return case.with_(plasticity=case.plasticity[rows], stability=case.stability[rows], group_ids=case.group_ids[rows])


def _finer(ids: Integers, rng: np.random.Generator) -> Integers:
    """Groups of four or more split in two strata of at least two."""
    out = np.zeros_like(ids)
    for number, slots in enumerate(group_slots(ids)):
        shuffled = rng.permutation(slots)
        cut = int(rng.integers(2, len(slots) - 1)) if len(slots) >= 4 else len(slots)
        out[shuffled[:cut]], out[shuffled[cut:]] = 2 * number, 2 * number + 1
    return out
