"""Training stacks under check: the update of a whole trainer, held to the loop over per-response gradients."""

from pcr_conformance.trainers.adapter import TrainerAdapter, TrainerDefaults, Unsupported
from pcr_conformance.trainers.load import TRAINER_NAMES, load_trainer
from pcr_conformance.trainers.oracle import expected
from pcr_conformance.trainers.problem import TrainerBatch, TrainerProblem, TrainerResult
from pcr_conformance.trainers.problems import make_problem
from pcr_conformance.trainers.registry import TRAINER_LAWS, TrainerLaw
from pcr_conformance.trainers.verdict import judge_trainer, judge_trainers

__all__ = [
    "TRAINER_LAWS",
    "TRAINER_NAMES",
    "TrainerAdapter",
    "TrainerBatch",
    "TrainerDefaults",
    "TrainerLaw",
    "TrainerProblem",
    "TrainerResult",
    "Unsupported",
    "expected",
    "judge_trainer",
    "judge_trainers",
    "load_trainer",
    "make_problem",
]
