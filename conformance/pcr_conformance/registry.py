"""Which laws there are, what each needs, and what it is tried on: written once for plugin, command and mutants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pcr_conformance import arguments as a
from pcr_conformance import laws
from pcr_conformance.adapter import Adapter, capabilities


@dataclass(frozen=True)
class Law:
    """A law with the level it belongs to, the capabilities it needs, and how its arguments are drawn.

    `share` is the part of the asked examples it gets: structural laws need fewer, and compiling ones cost more.
    """

    check: Callable[..., None]
    level: str
    draw: a.Drawn
    needs: frozenset[str] = frozenset()
    share: float = 1.0

    @property
    def name(self) -> str:
        return self.check.__name__

    def applies(self, adapter: Adapter) -> str | None:
        """Why the law is not for this adapter, or None."""
        lacking = self.needs - capabilities(adapter)
        return f"needs {', '.join(sorted(lacking))}" if lacking else None


_OBJECTIVE = frozenset({"objective"})

LAWS: tuple[Law, ...] = (
    Law(laws.no_conflict_is_the_plain_sum, "core", a.of_plain_sum),
    Law(laws.one_stream_absent_is_the_plain_sum, "core", a.of_absent),
    Law(laws.alpha_is_a_fraction, "core", a.of_kinds("kind", ("variance", "snr"))),
    Law(
        laws.conflict_keeps_its_fraction, "core", a.of_kinds("kind", ("variance", "snr", 0.25, 1.0), regimes=a.CONFLICT)
    ),
    Law(laws.projection_never_lengthens, "core", a.of_kinds("kind", ("variance", "snr", 1.0)), share=0.5),
    Law(laws.boost_is_capped, "core", a.of_kinds("max_boost", (0.5, 0.0, 10.0)), share=0.5),
    Law(laws.rotation_goes_through, "core", a.of_seed, share=0.5),
    Law(laws.order_does_not_matter, "core", a.of_seed, share=0.5),
    Law(laws.scale_goes_through, "core", a.of_scale),
    Law(laws.streams_of_their_own_share_no_noise, "core", a.of_own_streams, share=0.5),
    Law(laws.a_lone_response_tells_nothing, "core", a.of_lone, share=0.1),
    Law(laws.inputs_are_left_alone, "core", a.of_calls, share=0.3),
    Law(laws.calls_do_not_remember, "core", a.of_several_calls, share=0.4),
    Law(laws.records_are_complete, "numerics", a.of_resolve),
    Law(laws.statistics_are_exact, "numerics", a.of_statistics),
    Law(laws.weights_are_exact, "numerics", a.of_weights),
    Law(laws.update_is_the_combination, "numerics", a.of_resolve),
    Law(laws.what_is_resolved_is_reported, "numerics", a.of_resolve),
    Law(laws.long_sums_stay_accurate, "numerics", a.of_long(), share=0.2),
    Law(laws.float64_keeps_its_digits, "numerics", a.of_float64, frozenset({"float64"}), share=0.3),
    Law(laws.bfloat16_is_widened_first, "numerics", a.of_long("bfloat16"), frozenset({"bfloat16"}), share=0.2),
    Law(laws.in_place_equals_out_of_place, "numerics", a.of_plain, frozenset({"in_place"})),
    Law(laws.dtype_and_device_come_back, "numerics", a.of_dtypes, share=0.1),
    Law(laws.non_finite_is_never_hidden, "numerics", a.of_non_finite),
    Law(laws.non_finite_statistics_are_flagged, "numerics", a.of_non_finite_statistics),
    Law(laws.overflow_is_flagged, "numerics", a.of_overflow, share=0.5),
    Law(laws.finite_tells_what_is_written, "numerics", a.of_written, share=0.4),
    Law(laws.objective_is_exact, "objective", a.of_objective, _OBJECTIVE),
    Law(laws.masked_entries_have_no_say, "objective", a.of_objective, _OBJECTIVE),
    Law(laws.non_finite_tokens_are_not_hidden, "objective", a.of_non_finite_tokens, _OBJECTIVE, share=0.5),
    Law(laws.cotangents_equal_autodiff, "grad", a.of_autodiff, frozenset({"objective", "grad"})),
    Law(laws.compiled_equals_eager, "jit", a.of_compiled, frozenset({"compile"})),
    Law(laws.strata_add_up, "sharded", a.of_split),
    Law(laws.shards_add_up, "sharded", a.of_split),
    Law(laws.sharded_equals_one_device, "sharded", a.of_plain, frozenset({"sharded"})),
)
