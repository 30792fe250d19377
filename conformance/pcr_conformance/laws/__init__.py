"""One function per property of the method. Each takes an adapter and a case, and raises AssertionError with a reason.

No law knows a framework: what it sees of an implementation is NumPy records from an `Adapter`. Numbers in the
docstrings refer to the list of properties in the documentation of the mathematics.
"""

from pcr_conformance.laws.calls import calls_do_not_remember, inputs_are_left_alone, records_are_complete
from pcr_conformance.laws.exact import (
    bfloat16_is_widened_first,
    float64_keeps_its_digits,
    long_sums_stay_accurate,
    statistics_are_exact,
    update_is_the_combination,
    weights_are_exact,
    what_is_resolved_is_reported,
)
from pcr_conformance.laws.numerics import (
    compiled_equals_eager,
    dtype_and_device_come_back,
    finite_tells_what_is_written,
    in_place_equals_out_of_place,
    non_finite_is_never_hidden,
    non_finite_statistics_are_flagged,
    overflow_is_flagged,
    sharded_equals_one_device,
)
from pcr_conformance.laws.objective import (
    cotangents_equal_autodiff,
    masked_entries_have_no_say,
    non_finite_tokens_are_not_hidden,
    objective_is_exact,
)
from pcr_conformance.laws.projection import (
    alpha_is_a_fraction,
    boost_is_capped,
    conflict_keeps_its_fraction,
    no_conflict_is_the_plain_sum,
    one_stream_absent_is_the_plain_sum,
    projection_never_lengthens,
)
from pcr_conformance.laws.streams import a_lone_response_tells_nothing, streams_of_their_own_share_no_noise
from pcr_conformance.laws.symmetry import (
    order_does_not_matter,
    rotation_goes_through,
    scale_goes_through,
    shards_add_up,
    strata_add_up,
)

__all__ = [
    "a_lone_response_tells_nothing",
    "alpha_is_a_fraction",
    "bfloat16_is_widened_first",
    "boost_is_capped",
    "calls_do_not_remember",
    "compiled_equals_eager",
    "conflict_keeps_its_fraction",
    "cotangents_equal_autodiff",
    "dtype_and_device_come_back",
    "finite_tells_what_is_written",
    "float64_keeps_its_digits",
    "in_place_equals_out_of_place",
    "inputs_are_left_alone",
    "long_sums_stay_accurate",
    "masked_entries_have_no_say",
    "no_conflict_is_the_plain_sum",
    "non_finite_is_never_hidden",
    "non_finite_statistics_are_flagged",
    "non_finite_tokens_are_not_hidden",
    "objective_is_exact",
    "one_stream_absent_is_the_plain_sum",
    "order_does_not_matter",
    "overflow_is_flagged",
    "projection_never_lengthens",
    "records_are_complete",
    "rotation_goes_through",
    "scale_goes_through",
    "sharded_equals_one_device",
    "shards_add_up",
    "statistics_are_exact",
    "strata_add_up",
    "streams_of_their_own_share_no_noise",
    "update_is_the_combination",
    "weights_are_exact",
    "what_is_resolved_is_reported",
]
