"""From contributions to update on dense arrays: dtypes, blocks and what the filter remembers, by hand."""

from __future__ import annotations

import numpy as np
import pytest

import pcr_core as pcr

# two responses to one prompt; by block P = (4, 2), S = (-1, 1) and P = (2), S = (3)
P = np.asarray([[1.0, 0.0, 1.0], [3.0, 2.0, 1.0]])
S = np.asarray([[-1.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
IDS = np.asarray([4, 4])


@pytest.mark.parametrize(
    ("first", "second", "out"),
    [("float32", "float32", "float32"), ("float32", "float64", "float64"), ("float16", "float32", "float32")],
)
def test_the_update_has_the_wider_dtype(first: str, second: str, out: str) -> None:
    assert pcr.resolve(P.astype(first), S.astype(second), group_ids=IDS).update.dtype == out
    assert pcr.resolve(S.astype(second), P.astype(first), group_ids=IDS).update.dtype == out


def test_update_by_blocks() -> None:
    """v_p = 8, v_s = 2 in the first block: alpha = 4/5, and c/|S|^2 = -1. The second does not conflict."""
    res = pcr.resolve(P, S, group_ids=IDS, sizes=(2, 1), rule=pcr.PCR(alpha="variance"))
    np.testing.assert_allclose(res.weights.stability, [1.8, 1.0], rtol=1e-15)
    np.testing.assert_allclose(res.update, [4 - 1.8, 2 + 1.8, 5], rtol=1e-15)
    assert res.state is None


def test_the_filter_by_hand() -> None:
    """The first step is believed; the second meets a prior of twice the first's variance."""
    rule = pcr.PCR(alpha="variance", prior=pcr.TemporalPrior(0.5))
    first = pcr.resolve(P, S, group_ids=IDS, sizes=(2, 1), rule=rule)
    assert first.state is not None
    np.testing.assert_array_equal(first.state.plasticity_mean, [4, 2, 2])
    np.testing.assert_array_equal(first.state.stability_mean, [-1, 1, 3])
    np.testing.assert_allclose(first.state.plasticity_var, [8, 0], atol=1e-30)
    second = pcr.resolve(2 * P, 2 * S, group_ids=IDS, sizes=(2, 1), rule=rule, state=first.state)
    assert second.state is not None
    # v_p = 32 against 8/discount: gain 1/3, as for v_s = 8 against 4 and 4 against 2; without noise it is 1
    np.testing.assert_allclose(second.state.plasticity_mean, [16 / 3, 8 / 3, 4], rtol=1e-15)
    np.testing.assert_allclose(second.state.stability_mean, [-4 / 3, 4 / 3, 4], rtol=1e-15)
    np.testing.assert_allclose(second.state.plasticity_var, [32 / 3, 0], rtol=1e-15, atol=1e-30)
    np.testing.assert_allclose(second.state.stability_var, [8 / 3, 4 / 3], rtol=1e-15)
    # the means decide: p.s/|s|^2 = -1 and alpha = 4/5 again
    np.testing.assert_allclose(second.weights.stability, [1.8, 1], rtol=1e-15)
    np.testing.assert_allclose(second.weights.cosine, [-(0.1**0.5), 1], rtol=1e-15)
    np.testing.assert_allclose(second.update, [16 / 3 - 2.4, 8 / 3 + 2.4, 8], rtol=1e-15)
