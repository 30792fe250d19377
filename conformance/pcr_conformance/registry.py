"""Which laws there are, what each needs, and what it is tried on: written once for plugin, command and mutants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

import pcr_core as pcr
from pcr_conformance import grid, laws
from pcr_conformance.adapter import Adapter, capabilities, largest_exponent
from pcr_conformance.cases import Case
from pcr_conformance.strategies import FEW_COMBINATIONS, REGIMES, SHAPES, cases, objective_cases

CONFLICT = ("conflict", "antiparallel", "free", "one huge response", "nearly identical responses")
NO_CONFLICT = ("no conflict", "orthogonal", "parallel", "zero plasticity", "zero stability", "both zero", "free")

PROJECTIONS = (pcr.PCR(alpha="variance"), pcr.PCR.paper(), pcr.PCR(alpha="snr"), pcr.PCR.paper(update="literal"))
SHRINKING = pcr.PCR(alpha="variance", prior=pcr.ShrinkagePrior(), conflict="debiased")
DEBIASED = pcr.PCR(conflict="debiased")
PROBABLE = pcr.PCR(alpha="variance", gate="probability")
OTHERS = (pcr.GRPO(), pcr.NoAnchor(), pcr.HardProjection(), pcr.FixedAlpha(0.3), pcr.PCGrad(), pcr.MGDA())

LONG = 10_000  # terms: enough that what is lost in sums shows, few enough to be quick

Arguments = dict[str, Any]
Draw = Callable[[st.DataObject, Adapter], Arguments]


@dataclass(frozen=True)
class Law:
    """A law with the level it belongs to, the capabilities it needs, and how its arguments are drawn.

    `share` is the part of the asked examples it gets: structural laws need fewer, and compiling ones cost more.
    """

    check: Callable[..., None]
    level: str
    draw: Draw
    needs: frozenset[str] = frozenset()
    share: float = 1.0

    @property
    def name(self) -> str:
        return self.check.__name__

    def applies(self, adapter: Adapter) -> str | None:
        """Why the law is not for this adapter, or None."""
        lacking = self.needs - capabilities(adapter)
        return f"needs {', '.join(sorted(lacking))}" if lacking else None


def _case(data: st.DataObject, adapter: Adapter, dtype: str, **options: Any) -> Case:
    few = SHAPES[1:2] if adapter.compiled else SHAPES[:2] if _compiles(adapter) else SHAPES
    if "sharded" in adapter.capabilities:
        few = SHAPES[2:3]  # the one that splits evenly over 2, 4, 8 or 16 devices
    options.setdefault("shapes", few)
    if dtype == "float16":  # one huge response is beyond its range
        options["regimes"] = tuple(r for r in options.get("regimes", REGIMES) if "huge" not in r)
    case: Case = data.draw(cases(largest_exponent=largest_exponent(adapter, dtype), **options))
    return case


def _compiles(adapter: Adapter) -> bool:
    """JAX compiles every operation for each new shape, eager or not."""
    return adapter.compiled or "jax" in adapter.name


def _narrow(adapter: Adapter) -> str:
    return "float32" if "float32" in adapter.dtypes else adapter.dtypes[0]


def _one(adapter: Adapter, choices: Any) -> Any:
    """Fewer rules where each costs a compilation."""
    return st.sampled_from(choices[:1] if adapter.compiled else choices)


def _statistics(data: st.DataObject, adapter: Adapter) -> Arguments:
    dtype = data.draw(st.sampled_from(adapter.dtypes))
    return {"case": _case(data, adapter, dtype), "dtype": dtype}


def _weights(data: st.DataObject, adapter: Adapter) -> Arguments:
    dtype = _narrow(adapter)
    rule = data.draw(_one(adapter, (*PROJECTIONS, PROBABLE, DEBIASED, SHRINKING, *OTHERS)))
    return {"case": _case(data, adapter, dtype), "dtype": dtype, "rule": rule}


def _update(data: st.DataObject, adapter: Adapter) -> Arguments:
    dtype = data.draw(st.sampled_from(adapter.dtypes))
    rule = data.draw(_one(adapter, (*PROJECTIONS, SHRINKING, *OTHERS)))
    if dtype in ("float32", "float16") and rule in (pcr.PCR.paper(), pcr.HardProjection(), pcr.FixedAlpha(0.3)):
        rule = pcr.PCR(alpha="variance")  # an unbounded b S may be beyond what the output dtype can hold
    return {"case": _case(data, adapter, dtype), "dtype": dtype, "rule": rule}


def _plain_sum(data: st.DataObject, adapter: Adapter) -> Arguments:
    dtype = data.draw(st.sampled_from(adapter.dtypes[:2]))
    rule = data.draw(_one(adapter, (*PROJECTIONS, PROBABLE, pcr.HardProjection(), pcr.PCGrad())))
    return {"case": _case(data, adapter, dtype, regimes=NO_CONFLICT), "dtype": dtype, "rule": rule}


def _absent(data: st.DataObject, adapter: Adapter) -> Arguments:
    dtype = data.draw(st.sampled_from(adapter.dtypes[:2]))
    # the shortest vector is the one that would come out as zero
    rule = data.draw(_one(adapter, (pcr.MGDA(), *PROJECTIONS, DEBIASED, PROBABLE, *OTHERS[:-1])))
    stream = data.draw(st.sampled_from(("plasticity", "stability")))
    return {
        "case": _case(data, adapter, dtype, regimes=("free", "conflict", "orthogonal")),
        "dtype": dtype,
        "rule": rule,
        "stream": stream,
        "cancelling": data.draw(st.booleans()),
    }


def _kinds(name: str, kinds: tuple[Any, ...], **options: Any) -> Draw:
    def draw(data: st.DataObject, adapter: Adapter) -> Arguments:
        dtype = _narrow(adapter)
        kind = data.draw(_one(adapter, kinds))
        return {"case": _case(data, adapter, dtype, **options), "dtype": dtype, name: kind}

    return draw


def _seeded(rules: tuple[Any, ...]) -> Draw:
    def draw(data: st.DataObject, adapter: Adapter) -> Arguments:
        dtype = adapter.dtypes[0]
        rule = data.draw(_one(adapter, rules))
        seed = data.draw(st.integers(0, 2**32 - 1))
        return {"case": _case(data, adapter, dtype), "dtype": dtype, "rule": rule, "seed": seed}

    return draw


def _scale(data: st.DataObject, adapter: Adapter) -> Arguments:
    dtype = adapter.dtypes[0]
    rule = data.draw(_one(adapter, (*PROJECTIONS, PROBABLE)))
    power = data.draw(st.sampled_from([-5, 1, 4]))
    return {"case": _case(data, adapter, dtype), "dtype": dtype, "rule": rule, "power": power}


def _split(data: st.DataObject, adapter: Adapter) -> Arguments:
    dtype = _narrow(adapter)
    case = _case(data, adapter, dtype, shapes=SHAPES[1:2])
    return {"case": case, "dtype": dtype, "seed": data.draw(st.integers(0, 2**32 - 1))}


def _long(dtype: str | None = None) -> Draw:
    def draw(data: st.DataObject, adapter: Adapter) -> Arguments:
        kind = data.draw(st.sampled_from(adapter.dtypes)) if dtype is None else dtype
        seed = data.draw(st.integers(0, 2**32 - 1))
        return {"case": grid.case(seed, kind, LONG, data.draw(st.sampled_from((-1, 1)))), "dtype": kind}

    return draw


def _wide(data: st.DataObject, adapter: Adapter) -> Arguments:
    return {"case": _case(data, adapter, "float64"), "dtype": "float64"}


def _against_plain(data: st.DataObject, adapter: Adapter) -> Arguments:
    dtype = data.draw(st.sampled_from(adapter.dtypes))
    rules = (pcr.PCR(alpha="variance"), pcr.PCGrad(), pcr.PCR(alpha="snr"), pcr.GRPO())
    rule = data.draw(st.sampled_from(rules[:1] if _compiles(adapter) else rules))
    return {"case": _case(data, adapter, dtype), "dtype": dtype, "rule": rule}


def _compiled(data: st.DataObject, adapter: Adapter) -> Arguments:
    dtype = _narrow(adapter)
    rules = (pcr.PCR(alpha="variance", prior=pcr.ShrinkagePrior(), gate="probability"), pcr.PCR(alpha="variance"))
    rule = data.draw(st.sampled_from(rules[:1] if "torch" in adapter.name else rules))
    return {"case": _case(data, adapter, dtype), "dtype": dtype, "rule": rule}


def _dtypes(data: st.DataObject, adapter: Adapter) -> Arguments:
    case = data.draw(cases(shapes=SHAPES[1:2], largest_exponent=0, regimes=("free",)))
    return {"case": case, "rule": pcr.PCR(alpha="variance")}


def _non_finite(data: st.DataObject, adapter: Adapter) -> Arguments:
    dtype = _narrow(adapter)
    rule = data.draw(_one(adapter, (pcr.PCR(alpha="variance"), *PROJECTIONS[1:], PROBABLE, SHRINKING, *OTHERS)))
    case = data.draw(cases(shapes=SHAPES[1:2], largest_exponent=min(6, largest_exponent(adapter, dtype))))
    return {
        "case": case,
        "dtype": dtype,
        "rule": rule,
        "bad": data.draw(st.sampled_from([math.nan, math.inf, -math.inf])),
        "stream": data.draw(st.sampled_from(["plasticity", "stability"])),
        "response": data.draw(st.integers(0, len(case.group_ids) - 1)),
        "coordinate": data.draw(st.integers(0, sum(case.sizes) - 1)),
    }


def _overflow(data: st.DataObject, adapter: Adapter) -> Arguments:
    case = data.draw(cases(shapes=SHAPES[:1], regimes=("free", "conflict"), largest_exponent=2))
    rule = data.draw(_one(adapter, (*PROJECTIONS, pcr.MGDA())))
    return {"case": case, "dtype": adapter.dtypes[0], "rule": rule}


def _written(data: st.DataObject, adapter: Adapter) -> Arguments:
    case = data.draw(cases(shapes=SHAPES[1:2], regimes=("free", "conflict"), largest_exponent=0))
    rule = data.draw(_one(adapter, (pcr.PCR(), pcr.GRPO())))
    return {"case": case, "dtype": data.draw(st.sampled_from(adapter.dtypes)), "rule": rule}


def _objective(data: st.DataObject, adapter: Adapter) -> Arguments:
    return _tokens(data, adapter) | {"dtype": data.draw(st.sampled_from(adapter.dtypes))}


def _autodiff(data: st.DataObject, adapter: Adapter) -> Arguments:
    return _tokens(data, adapter) | {"dtype": adapter.dtypes[0]}


def _tokens(data: st.DataObject, adapter: Adapter) -> Arguments:
    few = FEW_COMBINATIONS if _compiles(adapter) else None
    return {"case": data.draw(objective_cases(shapes=((4, 3),), combinations=few))}


_OBJECTIVE = frozenset({"objective"})

LAWS: tuple[Law, ...] = (
    Law(laws.no_conflict_is_the_plain_sum, "core", _plain_sum),
    Law(laws.one_stream_absent_is_the_plain_sum, "core", _absent),
    Law(laws.alpha_is_a_fraction, "core", _kinds("kind", ("variance", "snr"))),
    Law(laws.conflict_keeps_its_fraction, "core", _kinds("kind", ("variance", "snr", 0.25, 1.0), regimes=CONFLICT)),
    Law(laws.projection_never_lengthens, "core", _kinds("kind", ("variance", "snr", 1.0))),
    Law(laws.boost_is_capped, "core", _kinds("max_boost", (0.5, 0.0, 10.0))),
    Law(laws.rotation_goes_through, "core", _seeded(PROJECTIONS)),
    Law(laws.order_does_not_matter, "core", _seeded(PROJECTIONS)),
    Law(laws.scale_goes_through, "core", _scale),
    Law(laws.statistics_are_exact, "numerics", _statistics),
    Law(laws.weights_are_exact, "numerics", _weights),
    Law(laws.update_is_the_combination, "numerics", _update),
    Law(laws.long_sums_stay_accurate, "numerics", _long(), share=0.2),
    Law(laws.float64_keeps_its_digits, "numerics", _wide, frozenset({"float64"}), share=0.5),
    Law(laws.bfloat16_is_widened_first, "numerics", _long("bfloat16"), frozenset({"bfloat16"}), share=0.2),
    Law(laws.in_place_equals_out_of_place, "numerics", _against_plain, frozenset({"in_place"})),
    Law(laws.dtype_and_device_come_back, "numerics", _dtypes, share=0.1),
    Law(laws.non_finite_is_never_hidden, "numerics", _non_finite),
    Law(laws.overflow_is_flagged, "numerics", _overflow, share=0.5),
    Law(laws.finite_tells_what_is_written, "numerics", _written, share=0.2),
    Law(laws.objective_is_exact, "objective", _objective, _OBJECTIVE),
    Law(laws.masked_entries_have_no_say, "objective", _objective, _OBJECTIVE),
    Law(laws.cotangents_equal_autodiff, "grad", _autodiff, frozenset({"objective", "grad"})),
    Law(laws.compiled_equals_eager, "jit", _compiled, frozenset({"compile"})),
    Law(laws.strata_add_up, "sharded", _split),
    Law(laws.shards_add_up, "sharded", _split),
    Law(laws.sharded_equals_one_device, "sharded", _against_plain, frozenset({"sharded"})),
)
