"""Laws 10 and 11: compilation, dtypes and numbers that are not finite."""

from __future__ import annotations

import numpy as np

import pcr_core
from pcr_conformance.adapter import Adapter, epsilon
from pcr_conformance.cases import Case
from pcr_conformance.laws.checks import as_seen, close, near, same_bits
from pcr_conformance.tolerances import errors, update_bounds
from pcr_core import Rule


def compiled_equals_eager(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """Law 10: a compiler may reorder sums and fuse multiplications, and no more."""
    assert adapter.eager is not None, f"{adapter.name} has nothing to be compared with"
    case = as_seen(adapter, case, dtype)
    eps = epsilon(adapter.accumulator)
    got, expected = adapter.resolve(case, rule, dtype), adapter.eager.resolve(case, rule, dtype)
    allowed = update_bounds(case, rule, eps, epsilon(dtype))
    for i, (block, bound) in enumerate(zip(case.blocks(), errors(case, eps))):
        law = f"law 10 (compiled equals eager), {rule}, block {i}"
        close(law, "dot", got.statistics.dot[i], expected.statistics.dot[i], 2 * bound.c)
        near(law, "update", got.update[block], expected.update[block], 2 * allowed[i])
    assert (got.dtype, got.device) == (expected.dtype, expected.device), f"law 10: {got.dtype} on {got.device}"
    same_bits("law 10 (compiled equals eager)", "finite", got.weights.finite, expected.weights.finite)


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


def overflow_is_flagged(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """Law 11: contributions whose squares leave the accumulator's range do not come out as plausible numbers."""
    # in place the totals are float32 gradients and their products may be wider: then it is the totals that overflow
    narrow = 1e38 if "in_place" in adapter.capabilities else 1e30
    largest = 1e200 if adapter.accumulator == "float64" else narrow
    res = adapter.resolve(case.with_(plasticity=np.full_like(case.plasticity, largest)), rule, dtype)
    law = f"law 11 (overflow), {rule}"
    assert not res.weights.finite.any(), f"{law}: not flagged"
    assert not np.isfinite(res.update).any(), f"{law}: came out as {res.update}"
