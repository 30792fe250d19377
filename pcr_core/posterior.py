"""Gaussian posterior over the mean of a noisy gradient: prior -> gain and variance per block (math.md section 3).

With a total P of noise variance v and a prior of mean m0 and variance t (both variances traces over the block), the
posterior mean is r P + (1 - r) m0 with gain r = t/(t + v) and variance r v: one scalar per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias

from pcr_core._namespace import ArrayT, common_namespace
from pcr_core._numbers import is_number


@dataclass(frozen=True)
class Posterior(Generic[ArrayT]):
    """Posterior of one stream: `gain` r in [0, 1] and `variance` r v (a trace, not per coordinate), both (blocks,)."""

    gain: ArrayT
    variance: ArrayT


class ZeroMeanPrior(Protocol):
    """A prior around zero: its posterior mean is the total times a gain."""

    def posterior(self, total_sq: ArrayT, variance: ArrayT) -> Posterior[ArrayT]:
        """Gain and variance from |P|^2 and the noise variance v of one stream, all (blocks,)."""


@dataclass(frozen=True)
class FlatPrior:
    """No prior knowledge: gain 1. The paper's setting and the default.

    Example:
        >>> import numpy as np
        >>> FlatPrior().posterior(np.asarray([4.0]), np.asarray([1.0])).gain
        array([1.])
    """

    def posterior(self, total_sq: ArrayT, variance: ArrayT) -> Posterior[ArrayT]:
        xp = common_namespace(total_sq=total_sq, variance=variance)
        return Posterior(xp.ones_like(variance), variance)


@dataclass(frozen=True)
class ShrinkagePrior:
    """Empirical Bayes around zero: gain max(1 - v/|P|^2, 0), the positive-part James-Stein factor.

    Example:
        >>> import numpy as np
        >>> ShrinkagePrior().posterior(np.asarray([4.0, 1.0]), np.asarray([1.0, 2.0])).gain
        array([0.75, 0.  ])
    """

    def posterior(self, total_sq: ArrayT, variance: ArrayT) -> Posterior[ArrayT]:
        xp = common_namespace(total_sq=total_sq, variance=variance)
        sq: Any = total_sq
        excess = sq - variance
        signal = excess > 0
        gain = xp.where(signal, excess / xp.where(signal, sq, xp.ones_like(sq)), xp.zeros_like(sq))
        gain = xp.where(xp.isnan(excess), excess, gain)
        return Posterior(gain, gain * variance)


@dataclass(frozen=True)
class TemporalPrior:
    """A scalar Kalman filter per block and stream: the prior is the last posterior, widened by 1/discount.

    A last variance of 0 is no past: a stream without noise has not begun, as S while the policy is the reference.

    The prior's mean is a vector, so whoever holds the gradients keeps one buffer M per stream and updates it with the
    gain: M <- r P + (1 - r) M. `discount` = 1 averages all steps equally; smaller forgets faster.

    Args:
        discount: in (0, 1].

    Example:
        The first step has no past (infinite prior variance); the second weighs it equally.

        >>> import numpy as np
        >>> prior, v = TemporalPrior(discount=1.0), np.asarray([2.0])
        >>> first = prior.posterior(v, previous_variance=np.asarray([np.inf]))
        >>> prior.posterior(v, previous_variance=first.variance).gain
        array([0.5])
    """

    discount: float = 0.9

    def __post_init__(self) -> None:
        if not (is_number(self.discount) and 0 < self.discount <= 1):
            raise ValueError(f"discount: expected a number in (0, 1], got {self.discount!r}")

    def posterior(self, variance: ArrayT, *, previous_variance: ArrayT) -> Posterior[ArrayT]:
        """Gain and new variance from this step's noise variance v and the last posterior's variance, all (blocks,)."""
        xp = common_namespace(variance=variance, previous_variance=previous_variance)
        v: Any = variance
        t: Any = previous_variance
        t = t / self.discount
        # a gain of 0 would stay 0: the next variance is r v
        fresh = t == 0
        gain = 1 / (1 + v / xp.where(fresh, xp.ones_like(t), t))
        gain = xp.where(fresh, xp.ones_like(gain), gain)
        gain = xp.where(xp.isnan(v), v, gain)
        return Posterior(gain, gain * v)


Prior: TypeAlias = FlatPrior | ShrinkagePrior | TemporalPrior
