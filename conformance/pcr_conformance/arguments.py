"""What each law is tried on: rules, geometries, dtypes and group structures, dealt so that a budget covers them all."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pcr_core as pcr
from pcr_conformance import geometries, grid
from pcr_conformance.adapter import Adapter, largest_exponent
from pcr_conformance.batches import FEW_COMBINATIONS, objective_case
from pcr_conformance.cases import Case, ObjectiveCase
from pcr_conformance.drawing import Draw
from pcr_conformance.regimes import FEW_SHAPES, REGIMES, SHAPES, SHARDED, STREAMS, TWO_BLOCKS, case
from pcr_core import Rule

Arguments = dict[str, Any]
Drawn = Callable[[Draw, Adapter], Arguments]

LONG = 10_007  # terms: enough that what is lost in sums shows, few enough to be quick; no row of lanes is filled

CONFLICT = ("conflict", "antiparallel", "opposite", "free", "one huge response", "nearly identical responses")
NO_CONFLICT = (
    "no conflict",
    "orthogonal",
    "parallel",
    "equal",
    "zero plasticity",
    "zero stability",
    "both zero",
    "free",
)

CAPS = (10.0, math.inf, 0.5, 0.0, 2.0)
#: each combination of PCR's options; the caps go round so that each meets each value of every other option
VARIANTS: tuple[pcr.PCR, ...] = tuple(
    pcr.PCR(alpha=alpha, prior=prior, update=update, gate=gate, conflict=conflict, max_boost=CAPS[number % len(CAPS)])  # type: ignore[arg-type]
    for number, (alpha, prior, update, gate, conflict) in enumerate(
        product(
            ("variance", "snr", 0.3),
            (pcr.FlatPrior(), pcr.ShrinkagePrior()),
            ("anchored", "literal"),
            ("sign", "probability"),
            ("raw", "debiased"),
        )
    )
)
OTHERS: tuple[Rule, ...] = (
    pcr.GRPO(),
    pcr.NoAnchor(),
    pcr.HardProjection(),
    pcr.FixedAlpha(0.3),
    pcr.PCGrad(),
    pcr.MGDA(),
    pcr.PCR(alpha=1.0),
    pcr.PCR(alpha=0.0),
)
RULES: tuple[Rule, ...] = (*VARIANTS, *OTHERS)
PLAIN = pcr.PCR(alpha="variance")
PROJECTIONS = (PLAIN, pcr.PCR.paper(), pcr.PCR(alpha="snr"), pcr.PCR.paper(update="literal"))
PROBABLE = pcr.PCR(alpha="variance", gate="probability")
SHRINKING = pcr.PCR(alpha="variance", prior=pcr.ShrinkagePrior(), conflict="debiased")
DEBIASED = pcr.PCR(conflict="debiased")


def of_statistics(draw: Draw, adapter: Adapter) -> Arguments:
    dtype = draw.deal("dtype", adapter.dtypes)
    return {"case": _case(draw, adapter, dtype, streams=STREAMS), "dtype": dtype}


def of_weights(draw: Draw, adapter: Adapter) -> Arguments:
    # one small program a rule; 7 and 48 have no divisor in common, so that every seventh has each option
    slow = adapter.compiled and "torch" in adapter.name
    rule = draw.deal("rule", RULES[::7] if slow else RULES)
    extreme = draw.deal("units", (False, True, False))
    drawn = geometries.statistics(draw, adapter.accumulator, extreme=extreme)
    return {"statistics": drawn, "rule": rule, "extreme": extreme}


def of_resolve(draw: Draw, adapter: Adapter) -> Arguments:
    dtype = draw.deal("dtype", adapter.dtypes)
    return {
        "case": _case(draw, adapter, dtype, streams=STREAMS),
        "dtype": dtype,
        "rule": _rule(draw, adapter, RULES),
    }


def of_plain_sum(draw: Draw, adapter: Adapter) -> Arguments:
    dtype = draw.deal("dtype", adapter.dtypes[:2])
    raw = tuple(r for r in VARIANTS if r.conflict == "raw" and isinstance(r.prior, pcr.FlatPrior))
    rule = _rule(draw, adapter, (*raw, pcr.HardProjection(), pcr.PCGrad(), pcr.FixedAlpha(0.3)))
    return {"case": _case(draw, adapter, dtype, regimes=NO_CONFLICT), "dtype": dtype, "rule": rule}


def of_absent(draw: Draw, adapter: Adapter) -> Arguments:
    dtype = draw.deal("dtype", adapter.dtypes[:2])
    # the shortest vector is the one that would come out as zero
    rule = _rule(draw, adapter, (pcr.MGDA(), *PROJECTIONS, DEBIASED, PROBABLE, *OTHERS[:5]))
    stream, cancelling = draw.deal("how", tuple(product(("plasticity", "stability"), (False, True))))
    drawn = _case(draw, adapter, dtype, regimes=("free", "conflict", "orthogonal"))
    return {"case": drawn, "dtype": dtype, "rule": rule, "stream": stream, "cancelling": cancelling}


def of_kinds(name: str, kinds: tuple[Any, ...], **options: Any) -> Drawn:
    def draw_(draw: Draw, adapter: Adapter) -> Arguments:
        dtype = narrow(adapter)
        kind = draw.deal(name, kinds[:1] if adapter.compiled else kinds)
        return {"case": _case(draw, adapter, dtype, **options), "dtype": dtype, name: kind}

    return draw_


def of_seed(draw: Draw, adapter: Adapter) -> Arguments:
    dtype, rule = adapter.dtypes[0], _rule(draw, adapter, (*PROJECTIONS, PROBABLE, SHRINKING, *OTHERS))
    return {"case": _case(draw, adapter, dtype), "dtype": dtype, "rule": rule, "seed": _seed(draw)}


def of_scale(draw: Draw, adapter: Adapter) -> Arguments:
    dtype, rule = adapter.dtypes[0], _rule(draw, adapter, (*PROJECTIONS, PROBABLE, SHRINKING, pcr.PCGrad(), pcr.MGDA()))
    power = draw.deal("power", (-5, 1, 4))
    return {"case": _case(draw, adapter, dtype), "dtype": dtype, "rule": rule, "power": power}


def of_split(draw: Draw, adapter: Adapter) -> Arguments:
    dtype = narrow(adapter)
    shapes = (TWO_BLOCKS,) if compiles(adapter) else SHAPES[:3]
    return {"case": _case(draw, adapter, dtype, shapes=shapes), "dtype": dtype, "seed": _seed(draw)}


def of_long(dtype: str | None = None) -> Drawn:
    def draw_(draw: Draw, adapter: Adapter) -> Arguments:
        kind = draw.deal("dtype", adapter.dtypes) if dtype is None else dtype
        sign = draw.deal("sign", (-1, 1))
        if dtype is not None or kind == "float16":  # whose range is too narrow
            return {"case": grid.case(_seed(draw), kind, LONG, sign), "dtype": kind}
        # a sum that takes small numbers for zero, or passes through something narrower, shows at the ends
        power = draw.deal("power", (0, -60, 30))
        return {"case": grid.case(_seed(draw), kind, LONG, sign, power), "dtype": kind, "power": power}

    return draw_


def of_float64(draw: Draw, adapter: Adapter) -> Arguments:
    return {"case": _case(draw, adapter, "float64"), "dtype": "float64"}


def of_own_streams(draw: Draw, adapter: Adapter) -> Arguments:
    dtype = draw.deal("dtype", adapter.dtypes)
    rule = _rule(draw, adapter, (PLAIN, DEBIASED, PROBABLE, SHRINKING, pcr.PCR(alpha="snr"), pcr.GRPO(), pcr.MGDA()))
    return {"case": _case(draw, adapter, dtype, streams=("own",)), "dtype": dtype, "rule": rule}


def of_lone(draw: Draw, adapter: Adapter) -> Arguments:
    stream, own = draw.deal("how", tuple(product(("plasticity", "stability"), (False, True))))
    drawn = _case(draw, adapter, adapter.dtypes[0], shapes=(TWO_BLOCKS,), regimes=("free",))
    return {"case": drawn, "dtype": adapter.dtypes[0], "stream": stream, "own": own}


def of_calls(draw: Draw, adapter: Adapter) -> Arguments:
    dtype = draw.deal("dtype", adapter.dtypes)
    shapes = (TWO_BLOCKS,) if compiles(adapter) else SHAPES[:2]
    batch = batch_of(draw, adapter, dtype) if "objective" in adapter.capabilities else None
    rule = _rule(draw, adapter, (PLAIN, PROBABLE, SHRINKING, *OTHERS))
    return {
        "case": _case(draw, adapter, dtype, shapes=shapes, streams=STREAMS),
        "dtype": dtype,
        "rule": rule,
        "batch": batch,
    }


def of_several_calls(draw: Draw, adapter: Adapter) -> Arguments:
    dtype = draw.deal("dtype", adapter.dtypes)
    rules = (PLAIN, PROBABLE, SHRINKING, pcr.PCR(alpha="snr"), pcr.MGDA(), pcr.PCGrad())
    batches = None
    if "objective" in adapter.capabilities:
        again = Draw("again", draw.seed, draw.index)
        batches = batch_of(draw, adapter, dtype), batch_of(again, adapter, dtype)
    return {
        "case": _case(draw, adapter, dtype, shapes=(TWO_BLOCKS,)),
        "dtype": dtype,
        "rule": _rule(draw, adapter, rules),
        "other": _rule(draw, adapter, (pcr.GRPO(), DEBIASED, pcr.HardProjection()), "other"),
        "seed": _seed(draw),
        "batches": batches,
    }


def of_plain(draw: Draw, adapter: Adapter) -> Arguments:
    """For what is compared with the adapter's `plain`."""
    dtype = draw.deal("dtype", adapter.dtypes)
    rules = (PLAIN, pcr.PCGrad(), pcr.PCR(alpha="snr"), pcr.GRPO())
    rule = draw.deal("rule", rules[:1] if compiles(adapter) else rules)
    return {"case": _case(draw, adapter, dtype), "dtype": dtype, "rule": rule}


def of_compiled(draw: Draw, adapter: Adapter) -> Arguments:
    dtype = narrow(adapter)
    rules = (pcr.PCR(alpha="variance", prior=pcr.ShrinkagePrior(), gate="probability"), PLAIN)
    rule = draw.deal("rule", rules[:1] if "torch" in adapter.name else rules)
    return {"case": _case(draw, adapter, dtype), "dtype": dtype, "rule": rule}


def of_dtypes(draw: Draw, adapter: Adapter) -> Arguments:
    return {"case": case(draw, shapes=(TWO_BLOCKS,), largest_exponent=0, regimes=("free",)), "rule": PLAIN}


def of_non_finite(draw: Draw, adapter: Adapter) -> Arguments:
    dtype = narrow(adapter)
    drawn = case(draw, shapes=(TWO_BLOCKS,), largest_exponent=min(6, largest_exponent(adapter, dtype)))
    return {
        "case": drawn,
        "dtype": dtype,
        "rule": _rule(draw, adapter, (PLAIN, *PROJECTIONS[1:], PROBABLE, SHRINKING, *OTHERS)),
        "bad": draw.deal("bad", (math.nan, math.inf, -math.inf)),
        "stream": draw.deal("stream", ("plasticity", "stability")),
        "response": draw.integer(0, len(drawn.group_ids) - 1),
        "coordinate": draw.integer(0, sum(drawn.sizes) - 1),
    }


def of_non_finite_statistics(draw: Draw, adapter: Adapter) -> Arguments:
    fields = ("plasticity_sq", "stability_sq", "dot", "plasticity_var", "stability_var", "covariance")
    field, bad = draw.deal("where", tuple(product(fields, (math.nan, math.inf))))
    return {
        "statistics": geometries.statistics(draw, adapter.accumulator),
        "rule": _rule(draw, adapter, (PLAIN, PROBABLE, SHRINKING, *OTHERS)),
        "field": field,
        "bad": bad,
        "block": draw.integer(0, len(geometries.GEOMETRIES) - 1),
    }


def of_overflow(draw: Draw, adapter: Adapter) -> Arguments:
    drawn = case(draw, shapes=((4, (3,)),), regimes=("free", "conflict"), largest_exponent=2)
    return {"case": drawn, "dtype": adapter.dtypes[0], "rule": _rule(draw, adapter, (*PROJECTIONS, *OTHERS))}


def of_written(draw: Draw, adapter: Adapter) -> Arguments:
    shapes = (TWO_BLOCKS,) if compiles(adapter) else (TWO_BLOCKS, (4, (1, 3, 2, 1, 2)))
    drawn = case(draw, shapes=shapes, regimes=("free", "conflict"), largest_exponent=0)
    rule = _rule(draw, adapter, (pcr.PCR(), pcr.GRPO()))
    broken = draw.integer(0, len(drawn.sizes) - 1)
    return {"case": drawn, "dtype": draw.deal("dtype", adapter.dtypes), "rule": rule, "broken": broken}


def of_objective(draw: Draw, adapter: Adapter) -> Arguments:
    dtype = draw.deal("dtype", adapter.dtypes)
    return {"case": batch_of(draw, adapter, dtype), "dtype": dtype}


def of_non_finite_tokens(draw: Draw, adapter: Adapter) -> Arguments:
    fields = ("advantages", "logp", "logp_old", "logp_ref")
    field, bad = draw.deal(
        "where", (*((f, math.nan) for f in fields), ("advantages", math.inf), ("advantages", -math.inf))
    )
    dtype = narrow(adapter)
    return {"case": batch_of(draw, adapter, dtype), "dtype": dtype, "field": field, "bad": bad}


def of_autodiff(draw: Draw, adapter: Adapter) -> Arguments:
    return {"case": batch_of(draw, adapter, adapter.dtypes[0], smooth=True), "dtype": adapter.dtypes[0]}


def batch_of(draw: Draw, adapter: Adapter, dtype: str, smooth: bool = False) -> ObjectiveCase:
    shapes = ((4, 3),) if compiles(adapter) else ((4, 3), (3, 5), (6, 2), (1, 4), (5, 1))
    few = FEW_COMBINATIONS if compiles(adapter) else None
    return objective_case(draw, dtype, shapes=shapes, combinations=few, smooth=smooth)


def compiles(adapter: Adapter) -> bool:
    """JAX compiles every operation for each new shape, eager or not."""
    return adapter.compiled or "jax" in adapter.name


def narrow(adapter: Adapter) -> str:
    return "float32" if "float32" in adapter.dtypes else adapter.dtypes[0]


def _seed(draw: Draw) -> int:
    return draw.integer(0, 2**32 - 1)


def _rule(draw: Draw, adapter: Adapter, rules: tuple[Any, ...], name: str = "rule") -> Any:
    """Fewer rules where each costs a compilation."""
    return draw.deal(name, rules[:1] if adapter.compiled else rules)


def _case(draw: Draw, adapter: Adapter, dtype: str, **options: Any) -> Case:
    few = (TWO_BLOCKS,) if adapter.compiled else FEW_SHAPES if compiles(adapter) else SHAPES
    if "sharded" in adapter.capabilities:
        few = (SHARDED,)
    options.setdefault("shapes", few)
    if dtype == "float16":  # one huge response is beyond its range
        options["regimes"] = tuple(r for r in options.get("regimes", REGIMES) if "huge" not in r)
    return case(draw, largest_exponent=largest_exponent(adapter, dtype), **options)
