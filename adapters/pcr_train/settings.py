"""Everything that decides a training run, in one record that is saved beside the results."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pcr_core import RULES, Rule, make_rule, needs_noise

EXTENDABLE = ("steps", "save_every")
"""Settings that may differ on --resume: they do not change the steps already taken."""

FRAMEWORKS = ("torch", "jax")
NORMS = ("auto", "fast", "loop")
PRECISIONS = ("float32", "bfloat16")
KL_ESTIMATORS = ("k3", "k3_ratio")

RULE_OPTIONS = ("alpha", "max_boost", "prior", "discount", "update", "gate", "conflict")


@dataclass(frozen=True)
class Settings:
    """One run of pcr-train; `Settings(model="tiny", task="chain_sum")` is complete.

    Attributes:
        model: "smollm2", "tiny", a local folder or a hub id.
        task: the name of a reasoning-gym data set.
        task_options: options of the data set.
        shots: worked examples in front of every question.
        style: "auto", "compact" or "full" prompts (see `tasks`).
        rule: one of `pcr_core.RULES`, or "module:name" of one of your own (`pcr_core.make_rule`), with `alpha`,
            `max_boost`, `prior`, `discount`, `update`, `gate`, `conflict`; None leaves the rule's own default.
        blocks: "mlp", "all" or a regular expression: the parameters that the rule acts on.
        granularity: "tensor", "module", "layer" or "global".
        norms: how per-response norms are measured: "auto", "fast" or "loop", see `pcr_torch.PCR`.
        noise_every: measure the gradients' noise in every K-th step, see `pcr_torch.PCR`; None for its default.
        baseline: share, in (0, 1], of the shift of advantages that measured gradient norms call for (docs/baseline.md);
            None for GRPO's own advantages.
        router_loss: coefficient of the load-balancing loss of a mixture of experts; 0 leaves it out.
        beta: coefficient of the KL divergence to the starting model; > 0.
        kl: estimator of that divergence: "k3", or "k3_ratio", k3 times the ratio (`pcr_core.grpo_objective`); None for
            the framework's own, which is TRL's default "k3_ratio" in torch and "k3" in jax.
        learning_rate: of Adam, constant.
        steps: optimizer steps.
        prompts: problems a step.
        generations: responses to each problem.
        micro_prompts: problems a forward pass; None takes all. Less needs less memory.
        precision: "float32", or "bfloat16" for matrix products (autocast); weights and statistics stay float32.
        max_tokens: longest response; None takes what the task's answers need, and two more.
        temperature: of the sampled responses.
        heldout: held-out problems, measured before and after.
        samples: responses to each held-out problem.
        retention_task: a second data set on which retention is measured; "none" for no other.
        save_every: steps between two checkpoints; the last step is always saved.
        seed: of problems, sampling and (tiny) the starting weights.
        framework: "torch", or "jax" with what its engine offers.
    """

    model: str = "smollm2"
    task: str = "chain_sum"
    task_options: dict[str, Any] = field(default_factory=dict)
    shots: int = 4
    style: str = "auto"
    rule: str = "pcr"
    alpha: str | float | None = None
    max_boost: float | None = None
    prior: str | None = None
    discount: float | None = None
    update: str | None = None
    gate: str | None = None
    conflict: str | None = None
    blocks: str = "mlp"
    granularity: str = "tensor"
    norms: str = "auto"
    noise_every: int | None = None
    baseline: float | None = None
    router_loss: float = 0.0
    beta: float = 0.04
    kl: str | None = None
    learning_rate: float = 4e-6
    steps: int = 12
    prompts: int = 4
    generations: int = 8
    micro_prompts: int | None = None
    precision: str = "float32"
    max_tokens: int | None = None
    temperature: float = 1.0
    heldout: int = 64
    samples: int = 2
    retention_task: str = "products"
    save_every: int = 50
    seed: int = 0
    framework: str = "torch"

    def __post_init__(self) -> None:
        if self.framework not in FRAMEWORKS:
            raise ValueError(f"--framework: expected one of {', '.join(FRAMEWORKS)}, got {self.framework!r}")
        module, sign, name = self.rule.partition(":")
        if self.rule not in RULES and not (module and sign and name):
            raise ValueError(f"--rule: expected one of {', '.join(RULES)} or module:name, got {self.rule!r}")
        try:
            self.make_rule()
        except ImportError as error:
            raise ValueError(f"--{error}") from error
        except TypeError as error:  # a rule of one's own that needs arguments
            raise ValueError(f"--rule: {self.rule} cannot be made: {error}") from error
        if self.norms not in NORMS:
            raise ValueError(f"--norms: expected one of {', '.join(NORMS)}, got {self.norms!r}")
        if self.noise_every is not None and self.noise_every < 0:
            raise ValueError(f"--noise-every: expected 0 (never) or more, got {self.noise_every}")
        if self.noise_every not in (None, 1) and needs_noise(self.make_rule()):
            raise ValueError(
                f"--noise-every {self.noise_every}: --rule {self.rule} with these options reads the noise of the "
                "gradients in every step; leave it out, or give --alpha a number"
            )
        if self.baseline is not None and not 0 < self.baseline <= 1:
            raise ValueError(f"--baseline: expected a share in (0, 1] such as 0.5, got {self.baseline}")
        if self.baseline is not None and self.noise_every == 0:
            raise ValueError("--noise-every 0: --baseline is estimated from the norms that are measured with the noise")
        if not 0 <= self.router_loss < math.inf:
            raise ValueError(f"--router-loss: expected a number >= 0, got {self.router_loss}")
        if not self.model:
            raise ValueError("--model: it is empty; expected smollm2, tiny, a local folder, or a hub id")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"--seed: expected 0 to {(1 << 32) - 1}, got {self.seed}")
        if not 0 < self.beta < math.inf:
            raise ValueError(
                f"--beta: expected a number > 0, got {self.beta}: without a KL term there is no stability gradient, so "
                "nothing for a rule to resolve. For plain GRPO without KL use trl.GRPOTrainer"
            )
        if self.kl not in (None, *KL_ESTIMATORS):
            raise ValueError(f"--kl: expected one of {', '.join(KL_ESTIMATORS)}, got {self.kl!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"--precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.generations < 2:
            raise ValueError(f"--generations: expected at least 2 (advantages compare them), got {self.generations}")
        for name in ("steps", "prompts", "max_tokens", "heldout", "samples", "save_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")
        if self.shots < 0:
            raise ValueError(f"--shots: expected 0 or more, got {self.shots}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate: expected a number > 0, got {self.learning_rate}")
        if not 0.01 <= self.temperature <= 100:  # beyond, responses are all alike, or nothing but noise
            raise ValueError(f"--temperature: expected 0.01 to 100, got {self.temperature}")
        if self.micro_prompts is not None and (self.micro_prompts < 1 or self.prompts % self.micro_prompts):
            raise ValueError(
                f"--micro-prompts: {self.micro_prompts} does not divide --prompts {self.prompts}; every forward pass "
                "takes the same number of whole groups"
            )

    def make_rule(self) -> Rule:
        """The rule that these settings describe; ValueError for an option that it does not have."""
        given = {name: getattr(self, name) for name in RULE_OPTIONS if getattr(self, name) is not None}
        return make_rule(self.rule, **given)

    def save(self, path: Path) -> None:
        replace_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Settings saved by `save`; ValueError where the file is not one of this version's."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**values)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a settings file of this version of pcr-train ({error})") from error

    def differences(self, other: Settings) -> list[str]:
        """Fields in which two runs differ, other than those that may change on --resume."""
        names = [f.name for f in fields(self) if f.name not in EXTENDABLE]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one move: a run killed meanwhile leaves the old one or the new one, never half of it."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


PRESETS: dict[str, dict[str, Any]] = {
    "smollm2": {"shots": 1},  # on chain_sum as good to learn from as 4, at half the cost
    "tiny": {"shots": 0, "learning_rate": 3e-4, "prompts": 8},
}
"""What a built-in model changes in the defaults of `Settings`."""


def make_settings(model: str = "smollm2", **given: Any) -> Settings:
    """Defaults, then the model's preset, then what was given (None: not given)."""
    values = {**PRESETS.get(model, {}), **{name: value for name, value in given.items() if value is not None}}
    return Settings(model=model, **values)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """["max_terms=2", "operators=[1, 2]"] as a dictionary; values are read as JSON where they are, else as text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise ValueError(f"--task-option: expected name=value, such as max_terms=2, got {pair!r}")
        try:
            options[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def title(settings: Settings) -> str:
    """One line over the plot of a run."""
    name = os.path.basename(settings.model.rstrip("/")) or settings.model
    name += "" if settings.framework == "torch" else f" in {settings.framework}"
    return (
        f"{name} on {settings.task}, rule {settings.rule}, beta {settings.beta:g}, "
        f"learning rate {settings.learning_rate:g}, seed {settings.seed}"
    )
