"""Wrong training stacks, each with the law that has to notice: the suite's own test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pcr_conformance.trainers import faults
from pcr_conformance.trainers.registry import TRAINER_LAWS
from pcr_conformance.trainers.stacks.numpy import LoopTrainer
from pcr_conformance.trainers.verdict import judge_trainer
from pcr_conformance.verdict import Verdict


class WrongTrainer(LoopTrainer):
    """`LoopTrainer` with one method replaced; the fault gets the method's own arguments."""

    def __init__(self, name: str, part: str, fault: Callable[..., Any]) -> None:
        self.name = name
        setattr(self, part, fault)


@dataclass(frozen=True)
class TrainerMutant:
    """A wrong trainer: what is wrong, the law that must notice, the method that is replaced, and by what."""

    name: str
    law: str
    part: str
    fault: Callable[..., Any]


def attack_trainer(mutant: TrainerMutant, examples: int = 6, seed: int = 0) -> Verdict:
    """The law's verdict on the wrong trainer, which should be "failed"."""
    (law,) = (law for law in TRAINER_LAWS if law.name == mutant.law)
    return judge_trainer(law, WrongTrainer(mutant.name, mutant.part, mutant.fault), examples, seed)


_SUM, _UPDATE, _PAD, _ORDER = (
    "sum_rule_is_the_plain_gradient",
    "update_is_the_loops",
    "padding_does_not_matter",
    "order_does_not_matter",
)
_SCALE, _RATE, _CALLS = "reward_scale_goes_through", "learning_rate_scales_the_step", "calls_are_independent"
_PARTS, _HALVES, _WORLD = "microbatches_add_up", "parts_of_groups_add_up", "processes_add_up"
_RESUME, _REPORT = "resumed_run_goes_on", "reported_statistics_are_the_loops"

TRAINER_MUTANTS: tuple[TrainerMutant, ...] = (
    TrainerMutant("ignores padding", _PAD, "objective", faults.given(mask=faults.whole_width)),
    TrainerMutant("ignores the mask within the longest", _SUM, "objective", faults.given(mask=faults.whole_width)),
    TrainerMutant("cuts the last token off", _SUM, "objective", faults.given(mask=faults.stops_at_the_second)),
    TrainerMutant("padded tokens are counted", _SUM, "objective", faults.normalized(faults.every_token)),
    TrainerMutant("normalises by padded columns", _PAD, "objective", faults.normalized(faults.of_columns)),
    TrainerMutant("logits of the wrong token", _SUM, "microbatch", faults.before_the_token),
    TrainerMutant("old log-probabilities ignored", _SUM, "objective", faults.given(logp_old=lambda _, b: b.logp_ref)),
    TrainerMutant("reference is the old policy", _SUM, "objective", faults.given(logp_ref=lambda _, b: b.logp_old)),
    TrainerMutant("no clip", _SUM, "train", faults.another(clip=lambda _: (np.inf, np.inf))),
    TrainerMutant("clip symmetric", _SUM, "train", faults.another(clip=lambda p: (p.clip[0], p.clip[0]))),
    TrainerMutant("beta twice", _SUM, "train", faults.another(beta=lambda p: p.beta**2)),
    TrainerMutant("another normalisation", _SUM, "train", faults.another(normalization=lambda _: "grpo")),
    TrainerMutant("a weight is not trained", _SUM, "step", faults.stepped(faults.embedding_left_out)),
    TrainerMutant("forgets the second microbatch", _PARTS, "process", faults.some(slice(None, 1))),
    TrainerMutant("keeps the last microbatch only", _PARTS, "process", faults.some(slice(-1, None))),
    TrainerMutant("normalises by microbatch", _PARTS, "objective", faults.normalized(faults.of_the_part)),
    TrainerMutant("mean over microbatches", _PARTS, "process", faults.mean_over_microbatches),
    TrainerMutant("resolves each microbatch", _PARTS, "process", faults.resolved_apart),
    TrainerMutant("noise of the last microbatch", _PARTS, "process", faults.noise_of_the_last),
    TrainerMutant("advantages of a part of a group", _HALVES, "objective", faults.given(advantages=faults.of_a_part)),
    TrainerMutant("advantages by place", _ORDER, "objective", faults.given(advantages=faults.advantages_by_place)),
    TrainerMutant("group ids taken as sorted", _ORDER, "strata", faults.sorted_ids),
    TrainerMutant("groups taken as two halves", _UPDATE, "strata", faults.two_halves),
    TrainerMutant("noise pooled over groups", _UPDATE, "strata", faults.one_stratum),
    TrainerMutant("advantages standardised again", _SCALE, "objective", faults.given(advantages=faults.standardised)),
    TrainerMutant("gradient clipped", _SCALE, "step", faults.stepped(faults.clipped)),
    TrainerMutant("Adam for SGD", _SCALE, "step", faults.stepped(faults.sign)),
    TrainerMutant("weight decay", _RATE, "step", faults.stepped(lambda _, w, u: {k: u[k] + 0.01 * w[k] for k in u})),
    TrainerMutant(
        "learning rate capped", _RATE, "train", faults.another(learning_rate=lambda p: min(p.learning_rate, 1.0))
    ),
    TrainerMutant("rule on all that is trained", _UPDATE, "combine", faults.everywhere),
    TrainerMutant("rule on the first block only", _UPDATE, "combine", faults.first_block_only),
    TrainerMutant("blocks swapped", _UPDATE, "combine", faults.blocks_swapped),
    TrainerMutant("no KL outside the blocks", _UPDATE, "combine", faults.no_sum_outside),
    TrainerMutant("one block of two", _UPDATE, "train", faults.another(blocks=lambda p: p.blocks[:1])),
    TrainerMutant("last batch left out", _UPDATE, "train", faults.another(batches=lambda p: p.batches[:1])),
    TrainerMutant(
        "first batch again", _UPDATE, "train", faults.another(batches=lambda p: p.batches[:1] * len(p.batches))
    ),
    TrainerMutant("all-reduce twice", _WORLD, "reduce", faults.summed_twice),
    TrainerMutant("mean over processes of shares", _WORLD, "reduce", faults.averaged_twice),
    TrainerMutant("all-reduce after the rule", _WORLD, "reduce", faults.reduced_after),
    TrainerMutant("no all-reduce", _WORLD, "reduce", faults.first_process),
    TrainerMutant("S is not reduced", _WORLD, "reduce", faults.stability_not_reduced),
    TrainerMutant("noise averaged over processes", _WORLD, "reduce", faults.noise_averaged),
    TrainerMutant("prior not resumed", _RESUME, "checkpoint", faults.without_prior),
    TrainerMutant("variances not resumed", _RESUME, "checkpoint", faults.without_variances),
    TrainerMutant("weights not resumed", _RESUME, "begin", faults.without_weights),
    TrainerMutant("momentum", _UPDATE, "step", faults.stepped(faults.Momentum())),
    TrainerMutant("momentum left to the next call", _CALLS, "step", faults.stepped(faults.Momentum())),
    TrainerMutant("prior left to the next call", _CALLS, "train", faults.prior_of_the_last_call()),
    TrainerMutant("steps in the caller's arrays", _CALLS, "step", faults.in_place),
    TrainerMutant(
        "reports norms for squares",
        _REPORT,
        "train",
        faults.reports_of(lambda s: replace(s, plasticity_sq=np.sqrt(s.plasticity_sq))),
    ),
    TrainerMutant(
        "reports no covariance", _REPORT, "train", faults.reports_of(lambda s: replace(s, covariance=0 * s.dot))
    ),
    TrainerMutant("reports the noise of the last microbatch", _REPORT, "process", faults.noise_of_the_last),
    TrainerMutant(
        "reports blocks in another order",
        _REPORT,
        "train",
        faults.reports_of(lambda s: type(s)(*(v[::-1] for v in vars(s).values()))),
    ),
)
