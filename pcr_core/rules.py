"""PCR and the rules it is compared with: statistics in, two weights per block out (math.md section 5).

Every rule is a frozen dataclass that can be called, so it hashes, compares, prints and travels as a static argument of
`jax.jit` (under torch.compile, make it outside the compiled function). All of them are linear in the two gradients and
share one code path.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Protocol, get_args, runtime_checkable

from pcr_core._namespace import ArrayT
from pcr_core._numbers import is_number
from pcr_core.posterior import FlatPrior, Posterior, Prior, ShrinkagePrior, TemporalPrior
from pcr_core.projection import (
    AlphaKind,
    Conflict,
    Gate,
    Update,
    Weights,
    check_statistics,
    one_absent,
    ratio,
    report,
    soft_projection,
)
from pcr_core.statistics import BlockStatistics, require_noise


@runtime_checkable
class Rule(Protocol):
    """Anything that turns statistics, shapes (blocks,), into weights of the two totals.

    A rule may say by an attribute `needs_noise` of False that it does without v_p, v_s and v_ps, which then need not be
    measured; see `needs_noise`.
    """

    def __call__(self, stats: BlockStatistics[ArrayT], /) -> Weights[ArrayT]: ...


@dataclass(frozen=True)
class PCR:
    """Probabilistic conflict resolution: an uncertainty-weighted soft projection per block.

    Args:
        alpha: a number in [0, 1]; or "variance", the paper's V_p/(V_p + V_s); or "snr", which uses signal-to-noise
            ratios and so is free of the streams' scales. Why 1/2 is the default: docs/evidence.md.
        max_boost: the largest addition to the KL pull of a block (kappa). Infinite in the paper, where an arbitrarily
            small stability gradient can veto an arbitrarily large plasticity gradient.
        prior: FlatPrior(), ShrinkagePrior() or TemporalPrior(discount).
        update: "anchored" adds the stability gradient to the projected one (equals GRPO without conflict); "literal" is
            the paper's equation 15 as written, which drops the KL pull.
        gate: "sign" or "probability".
        conflict: "raw" or "debiased" (subtracts the noise both streams share; not with TemporalPrior).

    Raises:
        ValueError: an option outside its range, or a combination that has no meaning.

    Example:
        >>> PCR(alpha=1.5)
        Traceback (most recent call last):
        ...
        ValueError: alpha: expected 'variance', 'snr' or a number in [0, 1], got 1.5
    """

    alpha: AlphaKind | float = 0.5
    max_boost: float = 10.0
    prior: Prior = FlatPrior()
    update: Update = "anchored"
    gate: Gate = "sign"
    conflict: Conflict = "raw"

    def __post_init__(self) -> None:
        _check_alpha(self.alpha, named=get_args(AlphaKind))
        if not (is_number(self.max_boost) and self.max_boost >= 0):
            raise ValueError(f"max_boost: expected a number >= 0 (math.inf for none), got {self.max_boost!r}")
        if not isinstance(self.prior, get_args(Prior)):
            raise TypeError(f"prior: expected FlatPrior(), ShrinkagePrior() or TemporalPrior(), got {self.prior!r}")
        for name, options in (("update", Update), ("gate", Gate), ("conflict", Conflict)):
            if getattr(self, name) not in get_args(options):
                raise ValueError(f"{name}: expected one of {get_args(options)}, got {getattr(self, name)!r}")
        if self.conflict == "debiased" and isinstance(self.prior, TemporalPrior):
            raise ValueError(
                "conflict='debiased' has no meaning with TemporalPrior: this step's shared noise is only part of the "
                "noise in the filtered means. Use FlatPrior() or ShrinkagePrior()"
            )

    @property
    def needs_noise(self) -> bool:
        """False for a number as alpha with the sign gate, the raw conflict and the flat prior, as by default."""
        plain = self.gate == "sign" and self.conflict == "raw" and isinstance(self.prior, FlatPrior)
        return isinstance(self.alpha, str) or not plain

    @classmethod
    def paper(cls, *, update: Update = "anchored") -> PCR:
        """The paper's setting: no cap, flat prior, sign gate, alpha from variances; `update` as named."""
        return cls(alpha="variance", max_boost=math.inf, update=update)

    def posteriors(
        self, stats: BlockStatistics[ArrayT], previous: tuple[ArrayT, ArrayT] | None = None
    ) -> tuple[Posterior[ArrayT], Posterior[ArrayT]]:
        """Posterior of both streams; `previous` holds their last variances, for TemporalPrior only."""
        vp, vs, _ = require_noise(stats, type(self.prior).__name__)
        if isinstance(self.prior, TemporalPrior):
            if previous is None:
                raise ValueError(
                    "TemporalPrior keeps state: use pcr_core.resolve(..., state=...) or an adapter, or give the last "
                    "variances (infinite at the first step) as `previous`"
                )
            return (
                self.prior.posterior(vp, previous_variance=previous[0]),
                self.prior.posterior(vs, previous_variance=previous[1]),
            )
        return (
            self.prior.posterior(stats.plasticity_sq, vp),
            self.prior.posterior(stats.stability_sq, vs),
        )

    def project(self, means: BlockStatistics[ArrayT]) -> Weights[ArrayT]:
        """Weights of the two posterior means, whose statistics these are (variances: the posteriors')."""
        return soft_projection(
            means,
            alpha=self.alpha,
            max_boost=self.max_boost,
            gate=self.gate,
            update=self.update,
            conflict=self.conflict,
        )

    def __call__(self, stats: BlockStatistics[ArrayT], /) -> Weights[ArrayT]:
        """Weights of the two totals. A prior around zero only scales them, so the totals' statistics suffice."""
        check_statistics(stats)
        if isinstance(self.prior, FlatPrior):
            return self.project(stats)
        p, s = self.posteriors(stats)
        gp: Any = p.gain
        gs: Any = s.gain
        means = replace(
            stats,
            plasticity_sq=gp * gp * stats.plasticity_sq,
            stability_sq=gs * gs * stats.stability_sq,
            dot=gp * gs * stats.dot,
            plasticity_var=p.variance,
            stability_var=s.variance,
            covariance=gp * gs * require_noise(stats, type(self.prior).__name__)[2],
        )
        raw = GRPO()(stats)
        w = self.project(means)
        return replace(
            w,
            plasticity=gp * w.plasticity,
            stability=gs * w.stability,
            cosine=raw.cosine,
            plasticity_nsr=raw.plasticity_nsr,
            stability_nsr=raw.stability_nsr,
        )


@dataclass(frozen=True)
class GRPO:
    """The plain sum P + S: what GRPO does."""

    needs_noise: ClassVar[bool] = False

    def __call__(self, stats: BlockStatistics[ArrayT], /) -> Weights[ArrayT]:
        return _constant(stats, plasticity=1.0, stability=1.0)


@dataclass(frozen=True)
class NoAnchor:
    """P alone in the blocks: no KL pull there, not even where P is zero."""

    needs_noise: ClassVar[bool] = False

    def __call__(self, stats: BlockStatistics[ArrayT], /) -> Weights[ArrayT]:
        return _constant(stats, plasticity=1.0, stability=0.0)


@dataclass(frozen=True)
class HardProjection:
    """One-sided PCGrad: P loses its whole component along S in conflict, and S is added."""

    needs_noise: ClassVar[bool] = False

    def __call__(self, stats: BlockStatistics[ArrayT], /) -> Weights[ArrayT]:
        return soft_projection(stats, alpha=1.0)


@dataclass(frozen=True)
class FixedAlpha:
    """Soft projection with a constant alpha in [0, 1], without a cap."""

    needs_noise: ClassVar[bool] = False

    alpha: float = 0.5

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)

    def __call__(self, stats: BlockStatistics[ArrayT], /) -> Weights[ArrayT]:
        return soft_projection(stats, alpha=self.alpha)


@dataclass(frozen=True)
class PCGrad:
    """Both gradients projected on the other's normal plane in conflict (Yu et al. 2020, two tasks)."""

    needs_noise: ClassVar[bool] = False

    def __call__(self, stats: BlockStatistics[ArrayT], /) -> Weights[ArrayT]:
        xp = check_statistics(stats)
        c: Any = stats.dot
        one_sided = soft_projection(stats, alpha=1.0)
        against = xp.where(one_sided.conflict, -c, xp.zeros_like(c))
        a: Any = one_sided.plasticity
        return replace(one_sided, plasticity=a + ratio(xp, against, stats.plasticity_sq))


@dataclass(frozen=True)
class MGDA:
    """The shortest vector between P and S (Desideri 2012); 1/2 each where P = S.

    Where one of the two is zero that would be zero for ever, so the update is their sum: a run whose blocks hold all
    that is trained begins at its reference, with S = 0. From then on S counts however weak it is, and the update is
    never longer than S: with a small beta MGDA hardly moves, which is the rule's own.
    """

    needs_noise: ClassVar[bool] = False

    def __call__(self, stats: BlockStatistics[ArrayT], /) -> Weights[ArrayT]:
        xp = check_statistics(stats)
        p2: Any = stats.plasticity_sq
        s2: Any = stats.stability_sq
        c: Any = stats.dot
        t = xp.clip(ratio(xp, s2 - c, p2 + s2 - 2 * c, empty=0.5), 0.0, 1.0)
        whole, absent = xp.ones_like(t), one_absent(stats)
        a, b = xp.where(absent, whole, t), xp.where(absent, whole, 1 - t)
        return report(xp, stats, plasticity=a, stability=b, alpha=xp.zeros_like(t), removed=1 - a)


def _constant(stats: BlockStatistics[ArrayT], *, plasticity: float, stability: float) -> Weights[ArrayT]:
    xp = check_statistics(stats)
    zero = xp.zeros_like(stats.plasticity_sq)
    return report(
        xp, stats, plasticity=zero + plasticity, stability=zero + stability, alpha=zero, needs_statistics=False
    )


def _check_alpha(alpha: Any, named: tuple[str, ...] = ()) -> None:
    if (isinstance(alpha, str) and alpha in named) or (is_number(alpha) and 0 <= alpha <= 1):
        return
    options = ", ".join(repr(name) for name in named)
    raise ValueError(f"alpha: expected {options + ' or ' if options else ''}a number in [0, 1], got {alpha!r}")


def needs_noise(rule: Rule) -> bool:
    """Whether a rule reads the noise of the gradients; true of one that does not say.

    Example:
        >>> needs_noise(PCR()), needs_noise(PCR(alpha="snr")), needs_noise(GRPO())
        (False, True, False)
    """
    return bool(getattr(rule, "needs_noise", True))


def require_rule(rule: Any) -> None:
    """TypeError for what is no rule, such as its name or its class."""
    if not callable(rule) or isinstance(rule, type):
        raise TypeError(f"rule: expected a rule such as pcr_core.PCR() or pcr_core.make_rule('pcr'), got {rule!r}")


RULES = ("pcr", "paper", "grpo", "no_anchor", "hard", "fixed", "pcgrad", "mgda")
PRIORS = ("flat", "shrinkage", "temporal")


def make_rule(name: str, *, prior: str = "flat", discount: float | None = None, **options: Any) -> Rule:
    """A rule from plain names and numbers, as configuration files and command lines hold them.

    Args:
        name: one of `RULES`, or "module:name" of a dataclass of your own that is a `Rule`.
        prior: one of `PRIORS`, for "pcr".
        discount: of the temporal prior, 0.9 by default.
        options: the rule's own arguments (`PCR` for "pcr", `update` for "paper", `alpha` for "fixed"); a number as
            `alpha` may be text.

    Raises:
        ValueError: an unknown name, or an option that the rule does not have.
        TypeError: no name.
        ImportError: of the module of your own rule.

    Example:
        >>> make_rule("pcr", alpha="snr", prior="shrinkage").prior
        ShrinkagePrior()
        >>> make_rule("grpo", alpha=0.5)
        Traceback (most recent call last):
        ...
        ValueError: rule 'grpo' has no option 'alpha'
    """
    if not isinstance(name, str):
        raise TypeError(f"rule: expected a name, one of {RULES} or module:name, got {name!r}")
    if prior not in PRIORS:
        raise ValueError(f"prior: expected one of {PRIORS}, got {prior!r}")
    if discount is not None and prior != "temporal":
        raise ValueError(f"discount: only prior='temporal' has one, and the prior is {prior!r}")
    if name == "pcr":
        temporal = TemporalPrior(0.9 if discount is None else discount)
        options["prior"] = {"flat": FlatPrior(), "shrinkage": ShrinkagePrior(), "temporal": temporal}[prior]
    elif prior != "flat":
        raise ValueError(f"rule {name!r} has no prior; only 'pcr' has")
    makers: dict[str, Any] = {
        "pcr": PCR,
        "paper": PCR.paper,
        "grpo": GRPO,
        "no_anchor": NoAnchor,
        "hard": HardProjection,
        "fixed": FixedAlpha,
        "pcgrad": PCGrad,
        "mgda": MGDA,
    }
    maker = _of_your_own(name) if ":" in name else makers.get(name)
    if maker is None:
        raise ValueError(f"rule: expected one of {RULES} or module:name, got {name!r}")
    known = ("update",) if name == "paper" else tuple(f.name for f in fields(maker))
    for option in options:
        if option not in known:
            raise ValueError(f"rule {name!r} has no option {option!r}")
    if isinstance(options.get("alpha"), str):
        options["alpha"] = _number_or_name(options["alpha"])
    rule: Rule = maker(**options)
    return rule


def _of_your_own(place: str) -> Any:
    module, _, name = place.partition(":")
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # whatever a module raises while it is imported
        what = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ImportError(f"rule: {module} cannot be imported: {what}") from error
    maker = getattr(imported, name, None)
    if maker is None:
        raise ValueError(f"rule: {module} has no {name!r}")
    if not (isinstance(maker, type) and is_dataclass(maker)):
        raise ValueError(f"rule: {place} is not a dataclass, as a rule of your own has to be")
    return maker


def _number_or_name(alpha: str) -> float | str:
    try:
        return float(alpha)
    except ValueError:
        return alpha
