"""Laws 10 and 11: compilation, dtypes and numbers that are not finite."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np

import pcr_core
from pcr_conformance.adapter import Adapter, Resolved, arithmetic, seen
from pcr_conformance.cases import Case
from pcr_conformance.laws.checks import as_seen, close, near, same_bits
from pcr_conformance.tolerances import errors, update_bounds
from pcr_core import BlockStatistics, Rule, Weights


def compiled_equals_eager(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """Law 10: a compiler may reorder sums and fuse multiplications, and no more."""
    got, plain = _equals_plain("law 10 (compiled equals eager)", adapter, case, dtype, rule)
    assert (got.dtype, got.device) == (plain.dtype, plain.device), f"law 10: {got.dtype} on {got.device}"


def sharded_equals_one_device(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """Law 8: coordinates split over devices give the update of one device, split as they were."""
    got, _ = _equals_plain("law 8 (sharded equals one device)", adapter, case, dtype, rule)
    assert got.sharding_kept, f"law 8 (sharded), {rule}: the update is not split over the devices as the totals were"


def in_place_equals_out_of_place(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """The update takes the plasticity total's memory, and is the one that leaves both totals alone."""
    got, _ = _equals_plain("in place equals out of place", adapter, case, dtype, rule)
    assert got.in_input_memory, f"in place, {rule}: the update lies in memory of its own"


def _equals_plain(law: str, adapter: Adapter, case: Case, dtype: str, rule: Rule) -> tuple[Resolved, Resolved]:
    """Either is within its own bound of the exact numbers."""
    assert adapter.plain is not None, f"{adapter.name} has nothing to be compared with"
    case = as_seen(adapter, case, dtype)
    both = (adapter, adapter.plain)
    got, expected = (each.resolve(case, rule, dtype) for each in both)
    updates = [update_bounds(case, rule, arithmetic(each), dtype) for each in both]
    sums = [errors(case, arithmetic(each)) for each in both]
    for i, block in enumerate(case.blocks()):
        dot = sum(bounds[i].c for bounds in sums)
        close(f"{law}, {rule}, block {i}", "dot", got.statistics.dot[i], expected.statistics.dot[i], dot)
        allowed = sum(bounds[i] for bounds in updates)
        near(f"{law}, {rule}, block {i}", "update", got.update[block], expected.update[block], allowed)
    same_bits(law, "finite", got.weights.finite, expected.weights.finite)
    return got, expected


def dtype_and_device_come_back(adapter: Adapter, case: Case, rule: Rule) -> None:
    """Law 10: the update has the dtype and the device of the contributions."""
    for dtype in adapter.dtypes:
        res = adapter.resolve(case, rule, dtype)
        assert res.dtype == dtype, f"law 10 (dtype), {rule}: {dtype} went in, {res.dtype} came out"
        assert res.device == adapter.device, f"law 10 (device), {rule}: {adapter.device} in, {res.device} out"


def non_finite_is_never_hidden(
    adapter: Adapter, case: Case, dtype: str, rule: Rule, bad: float, stream: str, response: int, coordinate: int
) -> None:
    """Law 11: one bad number shows in its block and raises its flag; other blocks keep every bit."""
    x = np.array(getattr(case, stream))
    x[response, coordinate] = bad
    clean, hurt = adapter.resolve(case, rule, dtype), adapter.resolve(case.with_(**{stream: x}), rule, dtype)
    law = f"law 11 (non-finite), {rule}, {bad} in {stream}"
    assert not np.isfinite(hurt.update[coordinate]), f"{law}: it came out as {hurt.update[coordinate]}"
    constant = isinstance(rule, pcr_core.GRPO | pcr_core.NoAnchor)
    for i, block in enumerate(case.blocks()):
        if block.start <= coordinate < block.stop:
            assert not hurt.weights.finite[i], f"{law}: block {i} is not flagged"
            spread = constant or not np.isfinite(hurt.update[block]).any()
            assert spread, f"{law}: parts of block {i} look usable: {hurt.update[block]}"
        else:
            assert hurt.weights.finite[i], f"{law}: block {i} is flagged, but nothing is wrong there"
            same_bits(law, f"update of block {i}", hurt.update[block], clean.update[block])
            same_bits(law, f"statistics of block {i}", hurt.statistics.dot[i], clean.statistics.dot[i])


def finite_tells_what_is_written(adapter: Adapter, case: Case, dtype: str, rule: Rule, broken: int) -> None:
    """Law 11: an update beyond its dtype, of contributions that are within and sums that are finite, is flagged."""
    p = np.array(case.plasticity)
    beyond = case.blocks()[broken]
    p[:, beyond] = 0.6 * _LARGEST[dtype]
    res = adapter.resolve(case.with_(plasticity=p), rule, dtype)
    law = f"law 11 (what is written), {rule}"
    assert not np.isfinite(res.update[beyond]).any(), f"{law}: {res.update[beyond]} is finite"
    for i, block in enumerate(case.blocks()):
        written = bool(np.isfinite(res.update[block]).all())
        assert bool(res.weights.finite[i]) == written, f"{law}, block {i}: flagged {not written} of {res.update[block]}"


_LARGEST = {"float64": 2.0**1023, "float32": 2.0**127, "bfloat16": 2.0**127, "float16": 2.0**15}


def overflow_is_flagged(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """Law 11: contributions whose squares leave the accumulator's range do not come out as plausible numbers."""
    # in place the totals are float32 gradients and their products may be wider: then it is the totals that overflow
    narrow = 1e38 if "in_place" in adapter.capabilities else 1e30
    largest = 1e200 if adapter.accumulator == "float64" else narrow
    res = adapter.resolve(case.with_(plasticity=np.full_like(case.plasticity, largest)), rule, dtype)
    law = f"law 11 (overflow), {rule}"
    assert not res.weights.finite.any(), f"{law}: not flagged"
    if not isinstance(rule, pcr_core.GRPO | pcr_core.NoAnchor):  # those use no sum; the update may be within range
        assert not np.isfinite(res.update).any(), f"{law}: came out as {res.update}"


def non_finite_statistics_are_flagged(
    adapter: Adapter, statistics: BlockStatistics[Any], rule: Rule, field: str, bad: float, block: int
) -> None:
    """Law 11: one sum that is not finite takes its block's flag down, and a and b with it where the rule uses sums."""
    clean = BlockStatistics(
        *(seen(adapter, getattr(statistics, f.name), adapter.accumulator) for f in fields(statistics))
    )
    x = np.array(getattr(clean, field))
    x[block] = bad
    before, after = adapter.weights(clean, rule), adapter.weights(replace(clean, **{field: x}), rule)
    law = f"law 11 (statistics), {rule}, {field} {bad} in block {block}"
    assert not after.finite[block], f"{law}: not flagged"
    pair = after.plasticity[block], after.stability[block]
    if isinstance(rule, pcr_core.GRPO | pcr_core.NoAnchor):
        assert pair == (before.plasticity[block], before.stability[block]), f"{law}: the constant weights are {pair}"
    else:
        assert np.isnan(pair).all(), f"{law}: a and b are {pair}, expected NaN"
    others = np.arange(len(x)) != block
    for f in fields(Weights):
        same_bits(f"{law}, other blocks", f.name, getattr(after, f.name)[others], getattr(before, f.name)[others])
