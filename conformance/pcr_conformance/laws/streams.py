"""Strata: streams from different responses, one stratum for all, and strata too small to tell anything."""

from __future__ import annotations

import numpy as np

from pcr_conformance import oracle
from pcr_conformance.adapter import Adapter, arithmetic
from pcr_conformance.cases import Case
from pcr_conformance.laws.checks import as_seen, near, same_bits
from pcr_conformance.laws.judging import judge_resolved, judge_statistics
from pcr_conformance.tolerances import update_bounds
from pcr_core import PCR, Rule


def streams_of_their_own_share_no_noise(adapter: Adapter, case: Case, dtype: str, rule: Rule) -> None:
    """Section 4: with a stability gradient from other responses v_ps is 0, and each stream has its own strata.

    Whose ids they are is said by `stability_group_ids` alone: the same numbers may stand for other prompts.
    """
    case = as_seen(adapter, case, dtype)
    law = f"streams of their own, {rule}"
    res = adapter.resolve(case, rule, dtype)
    same_bits(law, "covariance", res.statistics.covariance, np.zeros(len(case.sizes)))
    judge_resolved(law, adapter, case, dtype, rule, res)
    found = adapter.statistics(case, dtype)
    same_bits(law, "covariance", found.covariance, np.zeros(len(case.sizes)))
    judge_statistics(law, found, oracle.statistics(case), case, arithmetic(adapter))
    assert case.stability_group_ids is not None
    order = np.random.default_rng(len(case.stability)).permutation(len(case.stability))
    moved = case.with_(stability=case.stability[order], stability_group_ids=case.stability_group_ids[order])
    turned, bounds = adapter.resolve(moved, rule, dtype), update_bounds(case, rule, arithmetic(adapter), dtype)
    for i, block in enumerate(case.blocks()):
        near(f"{law}, in another order, block {i}", "update", turned.update[block], res.update[block], 2 * bounds[i])


def a_lone_response_tells_nothing(adapter: Adapter, case: Case, dtype: str, stream: str, own: bool) -> None:
    """Section 2: a stratum of one response has no variance. It is refused, or comes out as NaN with the flag down."""
    ids = np.array(case.group_ids)
    ids[0] = 1 + ids.max() if ids.max() < 2**31 - 1 else ids.min() - 1
    if own:
        names = (ids, np.array(case.group_ids)) if stream == "plasticity" else (np.array(case.group_ids), ids)
        case = case.with_(group_ids=names[0], stability_group_ids=names[1])
    else:
        case = case.with_(group_ids=ids)
    rule = PCR(alpha="variance")
    try:
        res = adapter.resolve(case, rule, dtype)
    except (ValueError, ArithmeticError, RuntimeError):
        return
    law = "a lone response"
    noise = res.statistics.plasticity_var if stream == "plasticity" or not own else res.statistics.stability_var
    assert np.isnan(np.asarray(noise)).all(), f"{law}: its stratum came out with the variance {noise}"
    assert not res.weights.finite.any(), f"{law}: not flagged"
    assert np.isnan(res.update).all(), f"{law}: the update is {res.update}"
