"""The options of `PCRTrainer`: TRL's for GRPO and PCR's own, as scripts, files and command lines give them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from trl import GRPOConfig

import pcr_core
from pcr_core._numbers import is_number
from pcr_core.projection import Conflict, Gate, Update
from pcr_core.statistics import Strata
from pcr_torch.baseline import Baseline
from pcr_torch.blocks import Granularity
from pcr_torch.meter import Meter
from pcr_torch.paths import Norms
from pcr_torch.trl.separability import refuse_baseline, refuse_beta

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")  # as transformers' parser reads them
_CHOICES = {
    "prior": Literal["flat", "shrinkage", "temporal"],
    "update": Update,
    "gate": Gate,
    "conflict": Conflict,
    "granularity": Granularity,
    "strata": Strata,
    "norms": Norms,
}


@dataclass
class PCRConfig(GRPOConfig):  # type: ignore[misc]
    """All options of `trl.GRPOConfig`, and those of PCR. `beta` must be above 0.

    Example:
        >>> config = PCRConfig(output_dir="out", beta=0.04, rule="pcr", alpha="snr", report_to="none", bf16=False)
        >>> config.make_rule()
        PCR(alpha='snr', max_boost=10.0, prior=FlatPrior(), update='anchored', gate='sign', conflict='raw')
    """

    rule: str = field(default="pcr", metadata={"help": f"Conflict rule: {', '.join(pcr_core.RULES)}, or module:name."})
    alpha: str | None = field(
        default=None,
        metadata={"help": "'variance' (paper), 'snr', or a number in [0, 1]; for pcr and fixed. None: the rule's own."},
    )
    max_boost: float | None = field(
        default=None, metadata={"help": "Largest addition to a block's KL weight, over beta; for pcr. None: 10."}
    )
    prior: str = field(default="flat", metadata={"help": f"Prior of both gradients: {', '.join(pcr_core.PRIORS)}."})
    discount: float | None = field(
        default=None, metadata={"help": "Forgetting of the temporal prior, in (0, 1]. None: 0.9."}
    )
    update: str | None = field(
        default=None, metadata={"help": "'anchored' (adds the KL gradient; what None is) or 'literal'."}
    )
    gate: str | None = field(default=None, metadata={"help": "'sign' (what None is) or 'probability' of the conflict."})
    conflict: str | None = field(
        default=None, metadata={"help": "'raw' (what None is) or 'debiased' (without the streams' shared noise)."}
    )
    blocks: str = field(default="mlp", metadata={"help": "'mlp', 'all', or a regular expression on parameter names."})
    granularity: str = field(default="tensor", metadata={"help": "One block per tensor, module, layer or global."})
    strata: str = field(default="group", metadata={"help": "'group', or 'batch' to allow groups cut to one response."})
    norms: str = field(default="auto", metadata={"help": "'auto', 'fast' or 'loop', see pcr_torch.PCR."})
    noise_every: int | None = field(
        default=None,
        metadata={
            "help": "Measure the gradients' noise in every K-th step; 0: never. Rules that need it have it in every "
            "step. None: every 10th, where it is cheap."
        },
    )
    every: int = field(
        default=1,
        metadata={"help": "Measure every K-th step, one backward pass between; one block of all that is trained only."},
    )
    baseline: float | None = field(
        default=None,
        metadata={
            "help": "Shift advantages by this share, in (0, 1], of what is optimal by measured gradient norms. None: "
            "GRPO's own advantages."
        },
    )
    baseline_memory: float = field(
        default=0.9, metadata={"help": "Weight of past measurements in the baseline, in [0, 1)."}
    )
    log_layers: bool = field(default=False, metadata={"help": "Log the pcr/ metrics of every layer as well."})

    def __post_init__(self) -> None:
        self.check()  # before the base class reads what may be text
        super().__post_init__()

    def check(self) -> None:
        """Text that says a number or a truth value becomes it; ValueError or TypeError for what is no option."""
        for name in ("beta", "max_boost", "discount", "baseline", "baseline_memory"):
            optional = name not in ("beta", "baseline_memory")
            setattr(self, name, _number(name, getattr(self, name), float, optional=optional))
        self.every = _number("every", self.every, int)
        self.noise_every = _number("noise_every", self.noise_every, int, optional=True)
        self.log_layers = _truth("log_layers", self.log_layers)
        for name, options in _CHOICES.items():
            value = getattr(self, name)
            absent = value is None and name in ("update", "gate", "conflict")
            if not absent and value not in get_args(options):
                raise ValueError(f"{name}: expected one of {get_args(options)}, got {value!r}")
        if not isinstance(self.blocks, str):
            raise TypeError(
                f"blocks: a config is saved as text, so it takes 'mlp', 'all' or a regular expression, got "
                f"{self.blocks!r}"
            )
        if not self.blocks:
            raise ValueError("blocks: an empty expression matches every parameter; say 'all' if that is meant")
        try:
            re.compile(self.blocks)
        except re.error as error:
            raise ValueError(f"blocks: {self.blocks!r} is no regular expression: {error}") from None
        if self.every < 1:
            raise ValueError(f"every: expected an integer >= 1, got {self.every!r}")
        if not (self.alpha is None or isinstance(self.alpha, str) or is_number(self.alpha)):
            raise TypeError(f"alpha: expected 'variance', 'snr' or a number in [0, 1], got {self.alpha!r}")
        if not isinstance(self.rule, str):
            raise TypeError(
                f"rule: a config is saved as text, so it takes the name of a rule ({', '.join(pcr_core.RULES)}, or "
                f"module:name of your own), got {self.rule!r}"
            )
        Meter.of(self.make_rule(), self.noise_every, baseline=self.baseline is not None)
        refuse_beta(self)
        Baseline(1.0 if self.baseline is None else self.baseline, self.baseline_memory)
        if self.baseline is not None:
            refuse_baseline(self)

    def make_rule(self) -> pcr_core.Rule:
        """The rule these options describe; ValueError for an option that the rule does not have."""
        names = ("alpha", "max_boost", "update", "gate", "conflict", "discount")
        options: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return pcr_core.make_rule(self.rule, prior=self.prior, **options)


def _number(name: str, value: Any, kind: type, *, optional: bool = False) -> Any:
    if value is None and optional:
        return None
    number = value
    if isinstance(value, str):
        try:
            number = kind(value)
        except ValueError:
            number = None
    if not is_number(number) or (kind is int and not float(number).is_integer()):
        raise ValueError(f"{name}: expected {'an integer' if kind is int else 'a number'}, got {value!r}")
    return kind(number)


def _truth(name: str, value: Any) -> bool:
    said = value.lower() if isinstance(value, str) else value
    if isinstance(value, bool) or said in (*_TRUE, *_FALSE):
        return value if isinstance(value, bool) else said in _TRUE
    raise ValueError(f"{name}: expected true or false, got {value!r}")
