"""The rules: frozen values, limits, names, and their life as hashable constants."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

import pcr_core as pcr

ALL = (
    pcr.PCR(alpha="variance"),
    pcr.GRPO(),
    pcr.NoAnchor(),
    pcr.HardProjection(),
    pcr.FixedAlpha(0.3),
    pcr.PCGrad(),
    pcr.MGDA(),
)


def _stats(p2=4.0, s2=1.0, c=-1.0, vp=3.0, vs=1.0, vps=-0.5, d=2.0):  # type: ignore[no-untyped-def]
    return pcr.BlockStatistics(*(np.asarray([x]) for x in (p2, s2, c, vp, vs, vps, d)))


def _ab(rule: pcr.Rule, **stats: float) -> tuple[float, float]:
    w = rule(_stats(**stats))
    return float(w.plasticity[0]), float(w.stability[0])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (pcr.GRPO(), (1, 1)),
        (pcr.NoAnchor(), (1, 0)),
        (pcr.HardProjection(), (1, 2)),
        (pcr.FixedAlpha(0.25), (1, 1.25)),
        (pcr.PCGrad(), (1.25, 2)),
        (pcr.MGDA(), (2 / 7, 5 / 7)),
        (pcr.PCR(), (1, 1.5)),
        (pcr.PCR(alpha="variance"), (1, 1.75)),
        (pcr.PCR.paper(update="literal"), (1, 0.75)),
        (pcr.PCR(alpha="variance", max_boost=0.5), (1, 1.5)),
        (pcr.PCR(alpha="snr"), (1, 1 + 3 / 7)),  # q_p = 4/3, q_s = 1
        (pcr.PCR(alpha="variance", conflict="debiased"), (1, 1 + 0.75 * 0.5)),
        (
            pcr.PCR(alpha="variance", gate="probability"),
            (1, 1 + 0.75 * 0.5 * math.erfc(-(0.1**0.5))),
        ),  # c = -1 of variance 5
        (pcr.PCR(alpha=0.5, prior=pcr.ShrinkagePrior()), (0.25, 0)),  # S is no more than its noise
    ],
)
def test_frozen_values(rule: pcr.Rule, expected: tuple[float, float]) -> None:
    assert _ab(rule) == pytest.approx(expected, rel=1e-15)


def test_shrinkage_scales_both_streams() -> None:
    """Gains 3/4 and 1/2: squares 9/4 and 1, debiased product -9/16, signal-to-noise ratios 3 and 1: alpha is 1/4."""
    rule = pcr.PCR(alpha="snr", prior=pcr.ShrinkagePrior(), conflict="debiased")
    w = rule(_stats(p2=4.0, vp=1.0, s2=4.0, vs=2.0, c=-2.0, vps=-0.5))
    boost = 9 / 64
    assert (w.alpha, w.plasticity) == (0.25, 0.75)
    assert w.stability == pytest.approx(0.5 * (1 + boost), rel=1e-15)
    assert w.removed == pytest.approx(boost / 1.5, rel=1e-15)


def test_cap_of_the_default() -> None:
    assert _ab(pcr.PCR(alpha="variance"), s2=1e-4) == (1, 11)
    assert _ab(pcr.PCR(alpha="variance", max_boost=0.0)) == (1, 1)
    assert _ab(pcr.PCR.paper(), s2=2.0**-14) == (1, 1 + 0.75 * 2**14)


@pytest.mark.parametrize(("p2", "s2", "a"), [(1.0, 9.0, 1.0), (9.0, 1.0, 0.0), (2.0, 2.0, 0.5)])
def test_mgda_stays_between_the_gradients(p2: float, s2: float, a: float) -> None:
    assert _ab(pcr.MGDA(), p2=p2, s2=s2, c=2.0) == (a, 1 - a)


def test_constants_need_no_statistics() -> None:
    w = pcr.GRPO()(_stats(c=math.nan))
    assert (w.plasticity, w.stability, w.finite, w.alpha) == (1, 1, False, 0)
    assert np.isnan(_ab(pcr.HardProjection(), c=math.nan)).all()


def test_pcgrad_projects_in_conflict_only() -> None:
    assert _ab(pcr.PCGrad(), c=0.5) == (1, 1)
    assert _ab(pcr.PCGrad(), c=-2.0) == (1.5, 3)


@pytest.mark.parametrize("alpha", [0, 0.0, 1, 1.0])
def test_ends_of_alpha(alpha: float) -> None:
    assert _ab(pcr.PCR(alpha=alpha)) == _ab(pcr.FixedAlpha(alpha)) == (1, 1 + alpha)


def test_limits_of_certainty() -> None:
    """A certain stability gradient gives the hard projection, a certain plasticity gradient none at all."""
    assert _ab(pcr.PCR.paper(), vs=0.0) == _ab(pcr.HardProjection())
    assert _ab(pcr.PCR.paper(), vp=0.0) == (1, 1)
    assert pcr.PCR(alpha="variance")(_stats(vp=0.0, vs=0.0)).alpha == 0.5
    assert pcr.PCR(alpha="snr")(_stats(vp=0.0, vs=0.0)).alpha == 0.5


def test_nothing_to_project_on() -> None:
    for rule in ALL[3:6]:
        assert _ab(rule, s2=0.0, c=0.0, vs=0.0) == (1, 1)
    assert _ab(pcr.MGDA(), p2=1.0, s2=1.0, c=1.0) == (0.5, 0.5)


LITERAL = pcr.PCR.paper(update="literal")


@pytest.mark.parametrize("rule", [*(pcr.make_rule(name) for name in pcr.RULES), LITERAL, pcr.PCR(conflict="debiased")])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_with_one_stream_absent_every_rule_is_the_plain_sum(rule: pcr.Rule, noise: float) -> None:
    """Without S all of P, without P all of S - but for rules whose update has no S in it at all."""
    quiet = {"c": 0.0, "vp": noise, "vs": noise, "vps": noise}
    no_s, no_p, none = (rule(_stats(p2=p2, s2=s2, **quiet)) for p2, s2 in ((4.0, 0.0), (0.0, 9.0), (0.0, 0.0)))
    without = rule in (pcr.NoAnchor(), LITERAL)
    for w in (no_s, no_p, none):
        assert (w.plasticity, w.stability, w.removed, w.conflict) == (1, 0 if without else 1, 0, False)


@pytest.mark.parametrize(
    ("rule", "removed"),
    [
        (pcr.GRPO(), 0),
        (pcr.NoAnchor(), 0),
        (pcr.HardProjection(), 1 / 2),  # |cos|
        (pcr.PCGrad(), 1 / 2),
        (pcr.FixedAlpha(0.5), 1 / 4),
        (LITERAL, 3 / 8),
        (pcr.PCR(alpha=1.0, max_boost=0.25), 1 / 8),
        (pcr.MGDA(), 5 / 7),  # 2/7 of P is let through
    ],
)
def test_what_is_removed_of_plasticity(rule: pcr.Rule, removed: float) -> None:
    assert rule(_stats()).removed == pytest.approx(removed, rel=1e-15)


def test_mgda_removes_all_of_a_longer_gradient_that_agrees() -> None:
    assert pcr.MGDA()(_stats(p2=9.0, s2=1.0, c=2.0)).removed == 1


def test_probability_gate_is_a_smooth_sign_gate() -> None:
    certain = {"vp": 1e-12, "vs": 1e-12}
    assert _ab(pcr.PCR(alpha="variance", gate="probability"), **certain) == pytest.approx(
        _ab(pcr.PCR(alpha="variance"), **certain)
    )
    noisy = {"c": -1e-9, "vp": 1e6, "vs": 1e6}
    w = pcr.PCR(alpha="variance", gate="probability")(_stats(**noisy))
    assert w.conflict_probability == pytest.approx(0.5)


def test_report() -> None:
    w = pcr.PCR(alpha="variance")(_stats())
    assert (w.cosine, w.conflict, w.finite) == (-0.5, True, True)
    assert w.removed == pytest.approx(0.75 * 0.5)
    assert (w.plasticity_nsr, w.stability_nsr) == (0.75, 1.0)
    assert pcr.GRPO()(_stats(s2=0.0, c=0.0)).stability_nsr == math.inf
    assert pcr.GRPO()(_stats(s2=0.0, c=0.0, vs=0.0)).stability_nsr == 0


def test_shrinkage_reports_the_totals_geometry() -> None:
    """A gain of zero does not turn the streams' measured cosine into zero."""
    w = pcr.PCR(alpha="variance", prior=pcr.ShrinkagePrior())(_stats(vs=2.0))
    assert w.cosine == -0.5
    assert w.stability_nsr == 2


@pytest.mark.parametrize("rule", ALL, ids=lambda r: type(r).__name__)
def test_rules_are_constants(rule: pcr.Rule) -> None:
    twin = pickle.loads(pickle.dumps(rule))
    assert twin == rule
    assert hash(twin) == hash(rule)
    assert isinstance(rule, pcr.Rule)
    with pytest.raises(AttributeError):
        rule.alpha = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", pcr.RULES)
def test_every_name_makes_its_rule(name: str) -> None:
    assert isinstance(pcr.make_rule(name), pcr.Rule)


def test_make_rule_passes_options() -> None:
    made = pcr.make_rule("pcr", prior="temporal", discount=0.5, alpha="snr", max_boost=2.0)
    assert made == pcr.PCR(prior=pcr.TemporalPrior(0.5), alpha="snr", max_boost=2.0)
    assert pcr.make_rule("paper", update="literal") == pcr.PCR.paper(update="literal")
    assert pcr.make_rule("paper") == pcr.PCR(alpha="variance", max_boost=math.inf)
    assert pcr.make_rule("pcr", prior="temporal") == pcr.PCR(prior=pcr.TemporalPrior())
    assert pcr.make_rule("fixed", alpha="0.25") == pcr.FixedAlpha(0.25)
    assert pcr.make_rule("pcr_core.rules:FixedAlpha", alpha=0.3) == pcr.FixedAlpha(0.3)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("nope",), {}, "rule: expected one of"),
        (("pcr",), {"prior": "nope"}, "prior: expected one of"),
        (("hard",), {"prior": "shrinkage"}, "has no prior"),
        (("grpo",), {"alpha": 0.5}, "has no option 'alpha'"),
        (("pcr_core.rules:Fixed",), {}, "has no 'Fixed'"),
        (("pcr_core.rules:make_rule",), {}, "not a dataclass"),
        (("pcr_core.rules:FixedAlpha",), {"beta": 1}, "has no option 'beta'"),
    ],
)
def test_make_rule_refuses(args: tuple[str], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pcr.make_rule(*args, **options)  # type: ignore[arg-type]
