"""What is masked has no say, however much of it there is and whatever it holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pcr_conformance.trainers.adapter import TrainerAdapter
from pcr_conformance.trainers.checks import same_weights
from pcr_conformance.trainers.draw import Draw
from pcr_conformance.trainers.oracle import expected
from pcr_conformance.trainers.problems import WORDS

WIDER = 3


def padding_does_not_matter(adapter: TrainerAdapter, draw: Draw) -> None:
    """Three more columns, and other tokens and log-probabilities wherever the mask is False."""
    problem, rng = draw.make(adapter), draw.rng
    batch = problem.batches[0]
    n, width = batch.mask.shape
    mask = np.zeros((n, width + WIDER), dtype=bool)
    mask[:, :width] = batch.mask
    tokens = rng.integers(WORDS, size=(n, batch.prompt + width + WIDER))
    tokens[:, : batch.prompt] = batch.tokens[:, : batch.prompt]
    old, ref = rng.uniform(-4, 0, size=(2, *mask.shape))
    for wide, narrow in ((tokens[:, batch.prompt :], batch.tokens[:, batch.prompt :]), (old, batch.logp_old)):
        wide[mask] = narrow[batch.mask]
    ref[mask] = batch.logp_ref[batch.mask]
    padded = replace(batch, tokens=tokens, mask=mask, logp_old=old, logp_ref=ref)
    draw.problem = replace(problem, batches=(padded,))
    same_weights(draw.law, adapter, adapter.train(draw.problem), expected(problem))
