"""What passes between the rooms is immutable, and priors and rules are constants that `jax.jit` can hash."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

import pcr_core as pcr

RECORDS = (pcr.BlockStatistics, pcr.Objective, pcr.Posterior, pcr.PriorState, pcr.Resolution, pcr.Scatter, pcr.Weights)
PRIORS = (pcr.FlatPrior(), pcr.ShrinkagePrior(), pcr.TemporalPrior(0.5))


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.__name__)
def test_records_are_frozen(record: Any) -> None:
    names = [f.name for f in fields(record)]
    one = record(*range(len(names)))
    assert one == record(**dict(zip(names, range(len(names)))))
    with pytest.raises(FrozenInstanceError):
        setattr(one, names[0], 1)


@pytest.mark.parametrize("prior", PRIORS, ids=lambda p: type(p).__name__)
def test_priors_are_constants(prior: pcr.Prior) -> None:
    assert len({pcr.PCR(alpha="variance", prior=prior), pcr.PCR(alpha="variance", prior=replace(prior))}) == 1
