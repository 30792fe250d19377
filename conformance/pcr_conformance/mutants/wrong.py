"""Wrong implementations, each with the law that has to notice: the suite's own test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import pcr_core as pcr
from pcr_conformance.adapter import Resolved
from pcr_conformance.cases import Case, ObjectiveCase
from pcr_conformance.dense import DenseAdapter
from pcr_conformance.registry import LAWS
from pcr_conformance.verdict import Verdict, judge
from pcr_core import BlockStatistics, Objective, Rule, Weights

Stats = BlockStatistics[Any]
Decision = Weights[Any]


class Wrong(DenseAdapter):
    """NumPy in three stages, one of which is replaced."""

    def __init__(self, name: str, stage: str, fault: Callable[..., Any]) -> None:
        self.name, self.stage, self.fault = name, stage, fault
        if stage in ("compile", "sharded", "in place"):
            self.plain = DenseAdapter()
            self.capabilities = frozenset({stage.replace(" ", "_")})
        if stage == "autodiff":
            self.capabilities = frozenset({"objective", "grad"})
        if "bfloat16" in name:
            self.dtypes = ("float64", "float32", "bfloat16")

    def from_numpy(self, x: Any, dtype: str) -> Any:
        return bfloat16(np.asarray(x)) if dtype == "bfloat16" else super().from_numpy(x, dtype)

    def statistics(self, case: Case, dtype: str) -> Stats:
        case = case.with_(plasticity=self._cast(case.plasticity, dtype), stability=self._cast(case.stability, dtype))
        with np.errstate(all="ignore"):
            stats: Stats = self.fault(case) if self.stage == "statistics" else honest(case)
            return stats

    def weights(self, statistics: Stats, rule: Rule) -> Decision:
        with np.errstate(all="ignore"):
            decided: Decision = self.fault(statistics, rule) if self.stage == "weights" else rule(statistics)
            return decided

    def resolve(self, case: Case, rule: Rule, dtype: str) -> Resolved:
        stats = self.statistics(case, dtype)
        weights = self.weights(stats, rule)
        p, s = self._cast(case.plasticity, dtype), self._cast(case.stability, dtype)
        fact = False
        combine = self.fault if self.stage in ("combine", "compile", "sharded", "in place") else combined
        with np.errstate(all="ignore"):
            update = combine(weights, p, s, case.sizes)
            if isinstance(update, tuple):
                update, fact = update
            if self.stage != "combine" or update.dtype == np.float64:
                update = self.from_numpy(update, dtype)
        if self.stage not in ("weights", "judgement"):
            written = [bool(np.isfinite(update[b]).all()) for b in case.blocks()]
            weights = replace(weights, finite=weights.finite & np.asarray(written))
        return Resolved(update.astype(np.float64), weights, stats, str(update.dtype), "cpu", fact, fact)

    def objective(self, case: ObjectiveCase, dtype: str) -> Objective[Any]:
        with np.errstate(all="ignore"):
            if self.stage == "objective":
                faulty: Objective[Any] = self.fault(lambda c: super(Wrong, self).objective(c, dtype), case)
                return faulty
            return super().objective(case, dtype)

    def autodiff(self, case: ObjectiveCase, dtype: str) -> tuple[Any, Any]:
        derivatives: tuple[Any, Any] = self.fault(self.objective(case, dtype))
        return derivatives

    def _cast(self, x: Any, dtype: str) -> Any:
        with np.errstate(all="ignore"):
            return np.asarray(self.from_numpy(x, dtype)).astype(np.float64)


def bfloat16(x: Any) -> Any:
    """The nearest bfloat16, as float32, of finite numbers."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return nearest.view(np.float32)


def honest(case: Case, **changes: Any) -> Stats:
    case = case.with_(**changes)
    stats: Stats = pcr.contribution_statistics(
        case.plasticity,
        case.stability,
        group_ids=case.group_ids,
        stability_group_ids=case.stability_group_ids,
        sizes=case.sizes,
        strata=case.strata,
    )
    return stats


def combined(w: Decision, p: Any, s: Any, sizes: tuple[int, ...]) -> Any:
    return np.repeat(w.plasticity, sizes) * p.sum(0) + np.repeat(w.stability, sizes) * s.sum(0)


@dataclass(frozen=True)
class Mutant:
    name: str
    law: str
    stage: str
    fault: Callable[..., Any]

    def adapter(self) -> Wrong:
        return Wrong(self.name, self.stage, self.fault)


def _scaled(case: Case, factor: Callable[[Case, Any], Any]) -> Stats:
    """Both variances times a factor."""
    stats = honest(case)
    f = factor(case, stats)
    return replace(stats, plasticity_var=stats.plasticity_var * f, stability_var=stats.stability_var * f)


def _without_bessel(case: Case) -> Stats:
    stats = honest(case)
    out = []
    for x in (case.plasticity, case.stability):
        total = np.zeros(x.shape[1])
        for g in np.unique(case.group_ids):
            rows = x[case.group_ids == g]
            total += ((rows - rows.mean(0)) ** 2).sum(0)
        out.append(np.array([total[block].sum() for block in case.blocks()]))
    return replace(stats, plasticity_var=out[0], stability_var=out[1])


def _narrow(case: Case, dtype: Any) -> Stats:
    return BlockStatistics(*(np.asarray(x, dtype).astype(np.float64) for x in vars(honest(case)).values()))


def _summed_in_float32(case: Case, block: int | None = None) -> Stats:
    """|P|^2, |S|^2 and P.S with float32 sums: of all terms, or of blocks that are then added in float64."""
    p, s = (x.sum(0).astype(np.float32) for x in (case.plasticity, case.stability))
    sums = []
    for x, y in ((p, p), (s, s), (p, s)):
        products = [
            np.add.reduceat(x[b] * y[b], np.arange(0, b.stop - b.start, block or 1 << 30)) for b in case.blocks()
        ]
        sums.append(np.asarray([float(each.astype(np.float64).sum()) for each in products]))
    return replace(honest(case), plasticity_sq=sums[0], stability_sq=sums[1], dot=sums[2])


def _narrowed(case: Case) -> Stats:
    return honest(case, plasticity=_f4(case.plasticity), stability=_f4(case.stability))


def _f4(x: Any) -> Any:
    return x.astype(np.float32).astype(np.float64)


def _truncated(w: Decision, p: Any, s: Any, sizes: tuple[int, ...]) -> Any:
    """Rounded to bfloat16 by cutting the lower half of the bits off."""
    bits = combined(w, p, s, sizes).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def _first_shard(w: Decision, p: Any, s: Any, sizes: tuple[int, ...]) -> Any:
    """Every shard but the first goes without the stability gradient."""
    there = np.arange(p.shape[1]) < p.shape[1] // 2
    return combined(w, p, np.where(there, s, 0.0), sizes), True


def _hidden(case: Case) -> Stats:
    return honest(case, plasticity=np.nan_to_num(case.plasticity), stability=np.nan_to_num(case.stability))


def _one_pass(case: Case) -> Stats:
    """|c|^2 less the mean's: cancels where responses are nearly identical."""
    variance = []
    for x in (case.plasticity, case.stability):
        v = np.zeros(len(case.sizes))
        for g in np.unique(case.group_ids):
            rows = x[case.group_ids == g]
            m = len(rows)
            for i, b in enumerate(case.blocks()):
                v[i] += m / (m - 1) * ((rows[:, b] ** 2).sum() - (rows[:, b].sum(0) ** 2).sum() / m)
        variance.append(np.maximum(v, 0))
    return replace(honest(case), plasticity_var=variance[0], stability_var=variance[1])


def _swap(stats: Stats, rule: Rule) -> Decision:
    return rule(replace(stats, plasticity_var=stats.stability_var, stability_var=stats.plasticity_var))


def _boost(change: Callable[[Any, Stats, Rule], Any], kinds: type = pcr.PCR) -> Callable[[Stats, Rule], Decision]:
    def fault(stats: Stats, rule: Rule) -> Decision:
        w = rule(stats)
        return replace(w, stability=change(w.stability, stats, rule)) if isinstance(rule, kinds) else w

    return fault


def _option(**changes: Any) -> Callable[[Stats, Rule], Decision]:
    """PCR that does not listen to one of its options."""
    return lambda stats, rule: (replace(rule, **changes) if isinstance(rule, pcr.PCR) else rule)(stats)


def _unclipped_gain(stats: Stats, rule: Rule) -> Decision:
    w = rule(stats)
    if not isinstance(rule, pcr.PCR) or not isinstance(rule.prior, pcr.ShrinkagePrior):
        return w
    return replace(w, plasticity=1 - stats.plasticity_var / np.maximum(stats.plasticity_sq, 1e-300))


def _wrong_tail(stats: Stats, rule: Rule) -> Decision:
    w = rule(stats)
    found: Any = w.conflict_probability
    if not (isinstance(rule, pcr.PCR) and rule.gate == "probability"):
        return replace(w, conflict_probability=1 - found)
    chance = np.clip(found, 1e-9, 1)
    return replace(w, stability=1 + (w.stability - 1) / chance * (1 - chance))


def _mgda_unclipped(stats: Stats, rule: Rule) -> Decision:
    w = rule(stats)
    if not isinstance(rule, pcr.MGDA):
        return w
    t = (stats.stability_sq - stats.dot) / (stats.plasticity_sq + stats.stability_sq - 2 * stats.dot)
    return replace(w, plasticity=t, stability=1 - t)


def _shortest_whatever_is_absent(stats: Stats, rule: Rule) -> Decision:
    w = rule(stats)
    if not isinstance(rule, pcr.MGDA):
        return w
    gap = stats.plasticity_sq + stats.stability_sq - 2 * stats.dot
    t = np.clip(np.where(gap == 0, 0.5, (stats.stability_sq - stats.dot) / gap), 0, 1)
    return replace(w, plasticity=t, stability=1 - t, removed=1 - t)


def _contaminating(w: Decision, p: Any, s: Any, sizes: tuple[int, ...]) -> Any:
    update = combined(w, p, s, sizes)
    return update + 0 * update.sum()


def _objective(change: Callable[[Objective[Any], ObjectiveCase], Objective[Any]]) -> Callable[..., Any]:
    return lambda run, case: change(run(case), case)


def _asked(change: Callable[[ObjectiveCase], ObjectiveCase]) -> Callable[..., Any]:
    return lambda run, case: run(change(case))


def _other_clip(run: Callable[[ObjectiveCase], Objective[Any]], case: ObjectiveCase) -> Objective[Any]:
    """For negative advantages the upper bound is taken, as if they were positive."""
    up, down = run(case), run(replace(case, advantages=np.abs(case.advantages)))
    sign = np.sign(case.advantages)
    return replace(
        up,
        plasticity_loss=sign * down.plasticity_loss,
        plasticity_cotangent=sign[:, None] * down.plasticity_cotangent,
    )


def _k1(o: Objective[Any], case: ObjectiveCase) -> Objective[Any]:
    """The derivative of logp - logp_ref, whose value is a constant."""
    gap = np.where(case.mask, case.logp_ref - case.logp, 0.0)
    factor = np.where(np.abs(1 - np.exp(gap)) > 0, 1 - np.exp(gap), 1.0)
    return replace(o, stability_cotangent=o.stability_cotangent / factor)


def _ratio_held(run: Callable[[ObjectiveCase], Objective[Any]], case: ObjectiveCase) -> Objective[Any]:
    """The derivative of k3 alone, times the ratio."""
    with_ratio = run(case)
    if case.kl == "k3":
        return with_ratio
    plain = run(replace(case, kl="k3")).stability_cotangent
    return replace(with_ratio, stability_cotangent=_kl_ratios(case) * plain)


def _ratio_clipped(run: Callable[[ObjectiveCase], Objective[Any]], case: ObjectiveCase) -> Objective[Any]:
    with_ratio = run(case)
    if case.kl == "k3":
        return with_ratio
    ratios = _kl_ratios(case)
    share = np.clip(ratios, 1 - case.clip[0], 1 + case.clip[1]) / ratios
    return replace(with_ratio, stability_cotangent=share * with_ratio.stability_cotangent)


def _kl_ratios(case: ObjectiveCase) -> Any:
    log_ratio = np.where(case.mask, case.logp - case.logp_old, 0.0)
    if case.importance == "sequence":
        log_ratio = log_ratio.sum(1, keepdims=True) / np.maximum(case.mask.sum(1, keepdims=True), 1)
    return np.exp(log_ratio)


_S, _W, _C, _O = "statistics_are_exact", "weights_are_exact", "update_is_the_combination", "objective_is_exact"

MUTANTS: tuple[Mutant, ...] = (
    Mutant("no Bessel factor", _S, "statistics", _without_bessel),
    Mutant("variance pooled over groups", _S, "statistics", lambda c: honest(c, strata="batch")),
    Mutant(
        "variance of the mean, not of the total",
        _S,
        "statistics",
        lambda c: _scaled(c, lambda c, s: 1 / len(c.group_ids)),
    ),
    Mutant("variance times n", _S, "statistics", lambda c: _scaled(c, lambda c, s: len(c.group_ids))),
    Mutant("variance per coordinate", _S, "statistics", lambda c: _scaled(c, lambda c, s: 1 / s.size)),
    Mutant("float32 accumulation", _S, "statistics", lambda c: _narrow(c, np.float32)),
    Mutant("float16 accumulation", _S, "statistics", lambda c: _narrow(c, np.float16)),
    Mutant("float32 accumulation of bfloat16", "bfloat16_is_widened_first", "statistics", _summed_in_float32),
    Mutant("bfloat16 by truncation", "bfloat16_is_widened_first", "combine", _truncated),
    Mutant(
        "float32 sums of blocks",
        "long_sums_stay_accurate",
        "statistics",
        lambda c: _summed_in_float32(c, block=1024),
    ),
    Mutant("float64 narrowed to float32", "float64_keeps_its_digits", "statistics", _narrowed),
    Mutant("one-pass variance", _S, "statistics", _one_pass),
    Mutant("non-finite hidden", "non_finite_is_never_hidden", "statistics", _hidden),
    Mutant("first response dropped", _S, "statistics", lambda c: honest(c, plasticity=_dropped(c.plasticity))),
    Mutant("block offsets by one", _S, "statistics", lambda c: honest(c, plasticity=np.roll(c.plasticity, 1, 1))),
    Mutant("group ids taken as sorted", _S, "statistics", lambda c: honest(c, group_ids=np.sort(c.group_ids))),
    Mutant("no covariance", _S, "statistics", lambda c: replace(honest(c), covariance=np.zeros(len(c.sizes)))),
    Mutant("covariance of the wrong sign", _S, "statistics", lambda c: _mapped(c, "covariance", np.negative)),
    Mutant("standard deviation for variance", _S, "statistics", lambda c: _mapped(c, "plasticity_var", np.sqrt)),
    Mutant("norm for squared norm", _S, "statistics", lambda c: _mapped(c, "stability_sq", np.sqrt)),
    Mutant("absolute inner product", _S, "statistics", lambda c: _mapped(c, "dot", np.abs)),
    Mutant("size off by one", "shards_add_up", "statistics", lambda c: _mapped(c, "size", lambda d: d + 1)),
    Mutant("averaged over shards", "shards_add_up", "statistics", lambda c: _averaged(c)),
    Mutant("batch's Bessel for each stratum", "strata_add_up", "statistics", lambda c: _scaled(c, _batch_bessel)),
    Mutant("alpha swapped", _W, "weights", _swap),
    Mutant("alpha swapped (monotone)", "alpha_is_a_fraction", "weights", _swap),
    Mutant(
        "sign of the conflict test", "no_conflict_is_the_plain_sum", "weights", lambda s, r: r(replace(s, dot=-s.dot))
    ),
    Mutant("unnormalised projection", _W, "weights", _boost(lambda b, s, r: 1 + (b - 1) * s.stability_sq)),
    Mutant("literal for anchored", _W, "weights", _option(update="literal")),
    Mutant("anchored for literal", "no_conflict_is_the_plain_sum", "weights", _option(update="anchored")),
    Mutant("no cap", "boost_is_capped", "weights", _option(max_boost=np.inf)),
    Mutant(
        "cap on b, not on b - 1",
        "boost_is_capped",
        "weights",
        _boost(lambda b, s, r: np.minimum(b, getattr(r, "max_boost", np.inf))),
    ),
    Mutant("unclipped shrinkage gain", _W, "weights", _unclipped_gain),
    Mutant("prior ignored", _W, "weights", _option(prior=pcr.FlatPrior(), conflict="raw")),
    Mutant("wrong tail of the gate", _W, "weights", _wrong_tail),
    Mutant("gate ignored", _W, "weights", _option(gate="sign")),
    Mutant("alpha always 1/2", _W, "weights", _option(alpha=0.5)),
    Mutant("alpha always 1", "conflict_keeps_its_fraction", "weights", lambda s, r: _half_reported(s, r)),
    Mutant(
        "projects without conflict",
        "no_conflict_is_the_plain_sum",
        "weights",
        lambda s, r: r(replace(s, dot=-abs(s.dot))),
    ),
    Mutant("projection too long", "projection_never_lengthens", "weights", _boost(lambda b, s, r: 3 * b)),
    Mutant(
        "MGDA rests at a zero stream", "one_stream_absent_is_the_plain_sum", "weights", _shortest_whatever_is_absent
    ),
    Mutant(
        "noise of a zero total projected",
        "one_stream_absent_is_the_plain_sum",
        "weights",
        lambda s, r: r(replace(s, plasticity_sq=np.maximum(s.plasticity_sq, 1e-300))),
    ),
    Mutant("what is written not judged", "finite_tells_what_is_written", "judgement", combined),
    Mutant("MGDA unclipped", _W, "weights", _mgda_unclipped),
    Mutant("PCGrad one-sided", _W, "weights", lambda s, r: (pcr.HardProjection() if r == pcr.PCGrad() else r)(s)),
    Mutant("finite flag always set", "overflow_is_flagged", "weights", lambda s, r: replace(r(s), finite=s.size > 0)),
    Mutant(
        "boost in absolute units", "scale_goes_through", "weights", _boost(lambda b, s, r: b + 1e-3 * s.plasticity_sq)
    ),
    Mutant("a and b swapped", _C, "combine", lambda w, p, s, n: combined(w, s, p, n)),
    Mutant("mean over responses", _C, "combine", lambda w, p, s, n: combined(w, p, s, n) / len(p)),
    Mutant("first block's weights for all", _C, "combine", lambda w, p, s, n: _first(w, p, s, n)),
    Mutant("absolute update", "rotation_goes_through", "combine", lambda w, p, s, n: np.abs(combined(w, p, s, n))),
    Mutant(
        "last response counts twice",
        "order_does_not_matter",
        "combine",
        lambda w, p, s, n: combined(w, p, s, n) + p[-1],
    ),
    Mutant(
        "half precision out",
        "dtype_and_device_come_back",
        "combine",
        lambda w, p, s, n: combined(w, p, s, n).astype(np.float32),
    ),
    Mutant("NaN spreads to other blocks", "non_finite_is_never_hidden", "combine", _contaminating),
    Mutant(
        "compiled drops digits",
        "compiled_equals_eager",
        "compile",
        lambda w, p, s, n: combined(w, p, s, n) * (1 + 1e-5),
    ),
    Mutant("sharding lost", "sharded_equals_one_device", "sharded", lambda w, p, s, n: (combined(w, p, s, n), False)),
    Mutant("stability on the first shard only", "sharded_equals_one_device", "sharded", _first_shard),
    Mutant(
        "in place into a copy",
        "in_place_equals_out_of_place",
        "in place",
        lambda w, p, s, n: (combined(w, p, s, n), False),
    ),
    Mutant(
        "in place on top of the old gradient",
        "in_place_equals_out_of_place",
        "in place",
        lambda w, p, s, n: (p.sum(0) + combined(w, p, s, n), True),
    ),
    Mutant("clip direction for negative advantages", _O, "objective", _other_clip),
    Mutant("k1 for k3", _O, "objective", _objective(_k1)),
    Mutant("no ratio in the KL", _O, "objective", _asked(lambda c: replace(c, kl="k3"))),
    Mutant("ratio always in the KL", _O, "objective", _asked(lambda c: replace(c, kl="k3_ratio"))),
    Mutant("ratio in the KL not differentiated", _O, "objective", _ratio_held),
    Mutant("ratio in the KL clipped", _O, "objective", _ratio_clipped),
    Mutant("beta twice", _O, "objective", _asked(lambda c: replace(c, beta=c.beta**2))),
    Mutant("beta left out", _O, "objective", _asked(lambda c: replace(c, beta=1.0))),
    Mutant("no clip", _O, "objective", _asked(lambda c: replace(c, clip=(0.999, 1e9)))),
    Mutant("token ratios for sequence ratios", _O, "objective", _asked(lambda c: replace(c, importance="token"))),
    Mutant("normalisation ignored", _O, "objective", _asked(lambda c: replace(c, normalization="grpo"))),
    Mutant(
        "mask dropped",
        "masked_entries_have_no_say",
        "objective",
        _asked(lambda c: replace(c, mask=np.ones_like(c.mask))),
    ),
    Mutant("reference swapped with policy", _O, "objective", _asked(lambda c: replace(c, logp_ref=c.logp_old))),
    Mutant(
        "cotangent of the wrong sign",
        "cotangents_equal_autodiff",
        "autodiff",
        lambda o: (-o.plasticity_cotangent, o.stability_cotangent),
    ),
)


def _dropped(x: Any) -> Any:
    return np.where(np.arange(len(x))[:, None] == 0, 0.0, x)


def _mapped(case: Case, name: str, change: Callable[[Any], Any]) -> Stats:
    stats = honest(case)
    return replace(stats, **{name: change(getattr(stats, name))})


def _averaged(case: Case) -> Stats:
    """Mean over coordinates in place of the sum."""
    stats = honest(case)
    return replace(stats, **{name: x / stats.size for name, x in vars(stats).items() if name != "size"})


def _batch_bessel(case: Case, stats: Stats) -> float:
    n = len(case.group_ids)
    return n / (n - 1)


def _half_reported(stats: Stats, rule: Rule) -> Decision:
    """Projects with alpha = 1, and reports the alpha it was asked for."""
    w = rule(stats)
    return replace(replace(rule, alpha=1.0)(stats), alpha=w.alpha) if isinstance(rule, pcr.PCR) else w


def _first(w: Decision, p: Any, s: Any, sizes: tuple[int, ...]) -> Any:
    return w.plasticity[0] * p.sum(0) + w.stability[0] * s.sum(0)


def attack(mutant: Mutant, examples: int = 300, seed: int = 0) -> Verdict:
    """The named law on the mutant; failed means killed."""
    law = next(law for law in LAWS if law.name == mutant.law)
    return judge(law, mutant.adapter(), examples, seed, shrink=False)
