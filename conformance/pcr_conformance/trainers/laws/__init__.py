"""The laws of training stacks: an adapter and a draw in, nothing out, AssertionError where a law is broken."""

from pcr_conformance.trainers.laws.calls import calls_are_independent
from pcr_conformance.trainers.laws.microbatches import microbatches_add_up, parts_of_groups_add_up
from pcr_conformance.trainers.laws.order import order_does_not_matter
from pcr_conformance.trainers.laws.padding import padding_does_not_matter
from pcr_conformance.trainers.laws.processes import processes_add_up
from pcr_conformance.trainers.laws.reports import reported_statistics_are_the_loops
from pcr_conformance.trainers.laws.resume import resumed_run_goes_on
from pcr_conformance.trainers.laws.scale import learning_rate_scales_the_step, reward_scale_goes_through
from pcr_conformance.trainers.laws.sum_rule import sum_rule_is_the_plain_gradient
from pcr_conformance.trainers.laws.update import update_is_the_loops

__all__ = [
    "calls_are_independent",
    "learning_rate_scales_the_step",
    "microbatches_add_up",
    "order_does_not_matter",
    "padding_does_not_matter",
    "parts_of_groups_add_up",
    "processes_add_up",
    "reported_statistics_are_the_loops",
    "resumed_run_goes_on",
    "reward_scale_goes_through",
    "sum_rule_is_the_plain_gradient",
    "update_is_the_loops",
]
