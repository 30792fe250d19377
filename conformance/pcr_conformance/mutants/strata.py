"""Wrong strata: whose ids they are, how many groups there may be, and how ids are told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pcr_conformance.cases import Case
from pcr_conformance.mutants.wrong import Mutant, Stats, honest

_S, _OWN = "statistics_are_exact", "streams_of_their_own_share_no_noise"


def _renamed(change: Callable[[Any], Any]) -> Callable[[Case], Stats]:
    """Both streams' ids under other names; what is left alone is alone no longer, so that it runs."""

    def names(ids: Any) -> Any:
        changed = np.asarray(change(ids))
        _, index, count = np.unique(changed, return_inverse=True, return_counts=True)
        lone = count[index] == 1
        return np.where(lone, index[np.argmax(~lone)] if (~lone).any() else 0, index)

    def fault(case: Case) -> Stats:
        other = case.stability_group_ids
        return honest(
            case, group_ids=names(case.group_ids), stability_group_ids=None if other is None else names(other)
        )

    return fault


def _ignored(case: Case) -> Stats:
    """The stability stream takes the plasticity stream's groups, as far as they go."""
    m = len(case.stability)
    if case.stability_group_ids is None:
        return honest(case)
    ids = np.resize(case.group_ids, m)
    ids[len(case.group_ids) :] = ids[0]
    return honest(case, stability_group_ids=ids)


def _exchanged(case: Case) -> Stats:
    other = case.stability_group_ids
    if other is None or len(other) != len(case.group_ids):
        return honest(case)
    return honest(case, group_ids=other, stability_group_ids=case.group_ids)


def _kept(case: Case, when: Callable[[Case], bool]) -> Stats:
    """The covariance of rows that happen to stand beside each other."""
    stats = honest(case)
    if case.stability_group_ids is None or len(case.stability) != len(case.plasticity) or not when(case):
        return stats
    return replace(stats, covariance=honest(case, stability_group_ids=None).covariance)


def _meet(case: Any) -> bool:
    return bool(np.isin(case.stability_group_ids, case.group_ids).any())


def _shared_if_alike(case: Case) -> Stats:
    other = case.stability_group_ids
    alike = other is not None and np.array_equal(other, case.group_ids)
    return honest(case, stability_group_ids=None if alike else other)


def _mean_size(case: Case) -> Stats:
    """Bessel's factor of groups of the mean size."""
    stats = honest(case)
    if case.strata == "batch":
        return stats
    v, n = [], len(case.group_ids)
    size = n / len(np.unique(case.group_ids))
    for block in case.blocks():
        total = 0.0
        for g in np.unique(case.group_ids):
            rows = case.plasticity[case.group_ids == g][:, block]
            total += ((rows - rows.mean(0)) ** 2).sum() * (size / (size - 1))
        v.append(total)
    return replace(stats, plasticity_var=np.asarray(v))


def _at_most(most: int) -> Callable[[Any], Any]:
    return lambda ids: np.minimum(np.unique(ids, return_inverse=True)[1], most - 1)


STRATA: tuple[Mutant, ...] = (
    Mutant("stability's ids ignored", _OWN, "statistics", _ignored),
    Mutant("ids of the streams exchanged", _OWN, "statistics", _exchanged),
    Mutant("covariance of independent streams", _OWN, "statistics", lambda c: _kept(c, lambda c: True)),
    Mutant("same ids taken for the same responses", _OWN, "statistics", _shared_if_alike),
    Mutant(
        "covariance unless ids are apart",
        _OWN,
        "statistics",
        lambda c: _kept(c, _meet),
    ),
    Mutant("strata='batch' ignored", _S, "statistics", lambda c: honest(_paired(c), strata="group")),
    Mutant("ids modulo 256", _S, "statistics", _renamed(lambda ids: ids % 256)),
    Mutant("ids as 8 bits", _S, "statistics", _renamed(lambda ids: ids.astype(np.int8))),
    Mutant("ids as 16 bits", _S, "statistics", _renamed(lambda ids: ids.astype(np.int16))),
    Mutant("ids as float32", _S, "statistics", _renamed(lambda ids: ids.astype(np.float32))),
    Mutant("absolute ids", _S, "statistics", _renamed(np.abs)),
    Mutant("negative ids are one group", _S, "statistics", _renamed(lambda ids: np.maximum(ids, -1))),
    Mutant("ids modulo 7", _S, "statistics", _renamed(lambda ids: ids % 7)),
    Mutant("at most 8 groups", _S, "statistics", _renamed(_at_most(8))),
    Mutant("at most 4 groups", _S, "statistics", _renamed(_at_most(4))),
    Mutant(
        "runs for groups",
        _S,
        "statistics",
        _renamed(lambda ids: np.cumsum(np.concatenate([[0], ids[1:] != ids[:-1]]))),
    ),
    Mutant("groups of the mean size", _S, "statistics", _mean_size),
)


def _paired(case: Case) -> Case:
    """Groups of one response put together, so that it runs."""
    if case.strata != "batch":
        return case
    _, index, count = np.unique(case.group_ids, return_inverse=True, return_counts=True)
    return case.with_(group_ids=np.where(count[index] == 1, -1, index) if (count == 1).sum() != 1 else 0 * index)
