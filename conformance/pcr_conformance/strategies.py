"""Random cases by regime, for Hypothesis: drawn in NumPy, so that all frameworks see the same numbers.

Few fixed shapes, because a compiled framework compiles once a shape. Hypothesis draws the regime, the grouping and the
scales, which shrink well; the numbers come from a seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from pcr_conformance.cases import Case, Floats, Integers, ObjectiveCase

Shape = tuple[int, tuple[int, ...]]

#: (number of responses, sizes of the blocks); the first two serve compiled frameworks
SHAPES: tuple[Shape, ...] = ((4, (3,)), (7, (2, 3)), (8, (16,)), (12, (1, 4, 4)), (5, (1,)))

REGIMES = (
    "free",
    "no conflict",
    "conflict",
    "orthogonal",
    "parallel",
    "antiparallel",
    "zero plasticity",
    "zero stability",
    "both zero",
    "nearly identical responses",
    "identical responses",
    "one huge response",
    "totals that cancel",
)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    regimes: tuple[str, ...] = REGIMES,
    shapes: tuple[Shape, ...] = SHAPES,
    largest_exponent: int = 18,
) -> Case:
    """A case in float64; round it to the implementation's input dtype before judging the outcome."""
    regime = draw(st.sampled_from(regimes))
    n, sizes = draw(st.sampled_from(shapes))
    ids = draw(group_ids(n))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    p, s = _contributions(regime, rng, n, sizes, ids)
    exponents = st.integers(-largest_exponent, largest_exponent)
    first = draw(exponents)
    # scales far apart leave b at 1 or at its cap, whatever the gate and alpha are: half of the cases share one scale
    second = draw(st.one_of(st.just(first), exponents))
    return Case(p * 10.0**first, s * 10.0**second, ids, sizes, regime=regime)


@st.composite
def group_ids(draw: st.DrawFn, n: int) -> Integers:
    """Ids of n responses in groups of two or more, in any order; ids need be neither sorted nor consecutive."""
    lengths, left = [], n
    while left:
        m = draw(st.sampled_from([m for m in range(2, left + 1) if left - m != 1]))
        lengths.append(m)
        left -= m
    names = draw(st.permutations([7, -3, 0, 1000, 12, 5][: len(lengths)]))
    ids = np.repeat(np.asarray(names, dtype=np.int64), lengths)
    return np.asarray(draw(st.permutations(ids.tolist())), dtype=np.int64)


def _contributions(
    regime: str, rng: np.random.Generator, n: int, sizes: tuple[int, ...], ids: Integers
) -> tuple[Floats, Floats]:
    d = sum(sizes)
    _, group = np.unique(ids, return_inverse=True)
    means = rng.normal(size=(2, int(group.max()) + 1, d))
    p, s = means[:, group] + rng.choice([0.1, 1.0]) * rng.normal(size=(2, n, d))
    if regime in ("conflict", "no conflict"):
        sign = -1 if regime == "conflict" else 1
        for block in _slices(sizes):
            inner = np.sum(p[:, block].sum(0) * s[:, block].sum(0))
            s[:, block] *= sign if inner >= 0 else -sign
    elif regime == "orthogonal":
        for block in _slices(sizes):  # disjoint supports: products are exactly zero
            half = (block.start + block.stop) // 2
            p[:, half : block.stop] = 0
            s[:, block.start : half] = 0
    elif regime in ("parallel", "antiparallel"):
        s = p * (0.5 if regime == "parallel" else -0.5)
    elif regime == "nearly identical responses":
        p, s = means[:, group] * (1 + 1e-9 * rng.normal(size=(2, n, d)))
    elif regime == "identical responses":
        p, s = means[:, group]
    elif regime == "one huge response":
        p[rng.integers(n)] *= 1e6
        s[rng.integers(n)] *= 1e6
    elif regime == "totals that cancel":
        p[-1] -= p.sum(0) * (1 - 1e-7)
        s[-1] -= s.sum(0) * (1 - 1e-7)
    if regime in ("zero plasticity", "both zero"):
        p = np.zeros_like(p)
    if regime in ("zero stability", "both zero"):
        s = np.zeros_like(s)
    return p, s


def _slices(sizes: tuple[int, ...]) -> list[slice]:
    ends = np.cumsum(sizes)
    return [slice(int(end - size), int(end)) for end, size in zip(ends, sizes)]


NORMALIZATIONS = ("grpo", "dapo", "bnpo", "dr_grpo")
IMPORTANCES = ("token", "sequence")
BETAS = (0.0, 0.04, 1.0)
CLIPS = ((0.2, 0.2), (0.2, 0.28), (0.05, 0.4))
NORMALIZERS = (None, 17.0)
KLS = ("k3", "k3_ratio")

ObjectiveOptions = tuple[float, tuple[float, float], str, str, float | None, str]

#: every value of every option at least once, for frameworks that compile each combination
FEW_COMBINATIONS: tuple[ObjectiveOptions, ...] = (
    (0.04, (0.2, 0.2), "grpo", "token", None, "k3"),
    (1.0, (0.2, 0.28), "dapo", "sequence", None, "k3_ratio"),
    (0.04, (0.05, 0.4), "bnpo", "token", 17.0, "k3_ratio"),
    (0.0, (0.2, 0.2), "dr_grpo", "sequence", 17.0, "k3"),
)


@st.composite
def objective_cases(
    draw: st.DrawFn,
    *,
    shapes: tuple[tuple[int, int], ...] = ((4, 3), (3, 5)),
    normalization: str | None = None,
    importance: str | None = None,
    combinations: tuple[ObjectiveOptions, ...] | None = None,
) -> ObjectiveCase:
    """A batch of responses; masked entries hold NaN, and ratios stay clear of the kinks at the clip bounds.

    `combinations` are the options to choose among, each of which costs a compiled framework a compilation; by default
    they are drawn one by one.
    """
    n, length = draw(st.sampled_from(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    regime = draw(st.sampled_from(("off policy", "on policy", "far from reference", "at reference")))
    logp = -rng.exponential(size=(n, length))
    old = logp if regime == "on policy" else logp + 0.4 * rng.normal(size=(n, length))
    reach = {"far from reference": 3.0, "at reference": 1e-5}.get(regime, 0.5)
    ref = logp + reach * rng.normal(size=(n, length))
    advantages = rng.normal(size=n)
    if draw(st.booleans()):
        advantages[0] = 0.0
    lengths = rng.integers(1, length + 1, size=n)
    if draw(st.booleans()):
        lengths[-1] = 0  # a response without tokens
    mask = np.arange(length)[None, :] < lengths[:, None]
    if combinations is None:
        options = draw(
            st.tuples(*(st.sampled_from(x) for x in (BETAS, CLIPS, NORMALIZATIONS, IMPORTANCES, NORMALIZERS, KLS)))
        )
    else:
        options = draw(st.sampled_from(combinations))
    beta, clip, normalized, ratios, normalizer, kl = options
    old = np.where(_near_kink(np.where(mask, logp - old, 0.0), mask, clip), logp, old)
    logp, old, ref = (np.where(mask, x, np.nan) for x in (logp, old, ref))
    return ObjectiveCase(
        logp,
        old,
        ref,
        advantages,
        mask,
        beta=beta,
        clip=clip,
        normalization=normalization or normalized,
        importance=importance or ratios,
        normalizer=normalizer,
        kl=kl,
        regime=regime,
    )


def _near_kink(log_ratio: Floats, mask: Any, clip: tuple[float, float]) -> Any:
    """Rows where a ratio, by token or by response, is so close to a clip bound that rounding could move it across."""
    mean = log_ratio.sum(1, keepdims=True) / np.maximum(mask.sum(1, keepdims=True), 1)
    ratios = np.exp(np.concatenate([log_ratio, mean], axis=1))
    bounds = np.asarray([1 - clip[0], 1 + clip[1]])
    return (np.abs(ratios[..., None] - bounds) < 1e-3).any(axis=(1, 2))[:, None]
