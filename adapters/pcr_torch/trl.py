"""PCR as a drop-in for TRL's GRPO: `PCRTrainer` and `PCRConfig` in place of `GRPOTrainer` and `GRPOConfig`.

The losses stay TRL's own, or a subclass's. Where the trainer would start the backward pass, the loss is taken apart
into the derivatives of its reward and its KL term with respect to the log-probabilities (`shared_forward.py`); two
backward passes take the place of one, and `.grad` is written when gradients synchronise.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import torch
from torch import Tensor

import pcr_core
from pcr_core.projection import Conflict, Gate, Update
from pcr_core.statistics import Strata
from pcr_torch import checkpoints
from pcr_torch.blocks import Granularity, select_blocks
from pcr_torch.method import PCR, Norms
from pcr_torch.report import Report
from pcr_torch.separability import refuse_beta, refuse_config, refuse_trainer
from pcr_torch.shared_forward import SharedForward

try:
    import trl.trainer.utils as trl_utils
    from accelerate import DistributedType
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError("pcr_torch.trl needs TRL 1.16: pip install 'pcr-grpo[trl]'") from error

_GROUP_IDS = "pcr_group_ids"
_log = logging.getLogger("pcr_torch")


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
    every: int = field(
        default=1,
        metadata={"help": "Measure every K-th step, one backward pass between; one block of all that is trained only."},
    )
    log_layers: bool = field(default=False, metadata={"help": "Log the pcr/ metrics of every layer as well."})

    def __post_init__(self) -> None:
        for name, kind in (("beta", float), ("max_boost", float), ("discount", float), ("every", int)):
            value = getattr(self, name)
            if isinstance(value, str):  # as files of settings may hold numbers
                try:
                    setattr(self, name, kind(value))
                except ValueError:
                    raise ValueError(f"{name}: expected a number, got {value!r}") from None
        if not isinstance(self.blocks, str):
            raise TypeError(
                f"blocks: a config is saved as text, so it takes 'mlp', 'all' or a regular expression, got "
                f"{self.blocks!r}"
            )
        super().__post_init__()
        self.make_rule()
        refuse_beta(self)
        for name, options in (("granularity", Granularity), ("strata", Strata), ("norms", Norms)):
            if getattr(self, name) not in get_args(options):
                raise ValueError(f"{name}: expected one of {get_args(options)}, got {getattr(self, name)!r}")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every: expected an integer >= 1, got {self.every!r}")

    def make_rule(self) -> pcr_core.Rule:
        """The rule these options describe; ValueError for an option that the rule does not have."""
        names = ("alpha", "max_boost", "update", "gate", "conflict", "discount")
        options: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for name, choices in (("update", Update), ("gate", Gate), ("conflict", Conflict)):
            if name in options and options[name] not in get_args(choices):
                raise ValueError(f"{name}: expected one of {get_args(choices)}, got {options[name]!r}")
        return pcr_core.make_rule(self.rule, prior=self.prior, **options)


class PCRTrainer(GRPOTrainer):  # type: ignore[misc]
    """`trl.GRPOTrainer` whose update resolves the conflict of reward and KL. Same arguments; `args` is a `PCRConfig`.

    Every optimizer step logs `pcr/conflict_rate`, `pcr/cosine`, `pcr/alpha`, `pcr/boost`, `pcr/removed`, both gradient
    norms and both noise-to-signal ratios; `last_report` holds the full `pcr_torch.Report`. Checkpoints carry the
    temporal prior's state.

    Runs on one process or several, with DDP or FSDP2 (`fsdp_version: 2`): each process logs the same `pcr/` metrics, of
    all processes. `method` is bound to the model as the accelerator prepared it when training starts, and again where
    layers are frozen or trained in turns; when training ends the model's layers are their own again. Checkpoints hold
    whole tensors, so PCR's part of them can be resumed on another number of processes.

    Raises:
        TypeError: `args` is not a PCRConfig.
        ValueError: a setting under which the two gradients cannot be told apart, with the reason.
    """

    _tag_names = ("trl", "grpo", "pcr")
    _beta: float
    _metrics: Any
    _step: int
    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if not isinstance(config, PCRConfig):
            raise TypeError(f"args: expected a pcr_torch.trl.PCRConfig (with beta > 0), got {type(config).__name__}")
        refuse_config(config)
        self._shared: SharedForward | None = None
        self._group_ids: Tensor | None = None  # of the microbatch
        self._sampler: Any = None  # of prompts, in training; None for a stream of them
        super().__init__(*args, **kwargs)
        refuse_trainer(self)
        self.method: PCR | None = None
        self._bound: Any = None
        self._trained: tuple[bool, ...] = ()
        if self.accelerator.distributed_type == DistributedType.NO:
            self._bind(self.model)  # errors come before training; the layers are themselves again until then
            self._release()
        else:  # the accelerator wraps the model, or replaces its parameters, when training starts
            select_blocks(self.model, config.blocks, cast(Granularity, config.granularity))
        self.last_report: Report | None = None

    # -- bound to the model as it is trained -----------------------------------------------------------------------

    def _bind(self, model: Any) -> PCR:
        """PCR of the prepared model; a new one, with the old one's state, where `train` wrapped the model again."""
        if self.method is not None and self._bound is model:
            return self.method
        config, state = self.args, None
        if self.method is not None:
            state = self.method.state_dict()
            self.method.remove()
        self._bound, self._trained = model, _trained(model)
        self.method = PCR(
            model,
            blocks=config.blocks,
            granularity=cast(Granularity, config.granularity),
            rule=config.make_rule(),
            strata=cast(Strata, config.strata),
            norms=cast(Norms, config.norms),
            every=config.every,
        )
        if state is not None and state["blocks"] == [block.name for block in self.method.blocks]:
            self.method.load_state_dict(state)
        elif state is not None and (state["prior"] is not None or state["last"] is not None):
            _log.warning(
                "blocks: other parameters are trained than before, so what was measured until now is forgotten"
            )
        return self.method

    def _release(self) -> None:
        """Give the model's layers their own forward back, until training goes on."""
        if self.method is not None:
            self.method.remove()
        self._bound = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._release()

    def _follow_frozen(self) -> None:
        """Bind again where layers were frozen or trained in turns since the last step."""
        if self._bound is None or self.method is None or self.method.accumulated:
            return
        if self._trained != _trained(self._bound):
            bound, self._bound = self._bound, None
            self._bind(bound)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.method is not None:  # a training that was interrupted may have left a micro-batch behind
            self.method.discard()
        self._bind(self.model_wrapped)
        return prepared

    # -- groups stay whole ---------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        count = self.num_generations if self.model.training else self.num_generations_eval
        n = output["completion_ids"].shape[0]
        first = self.accelerator.process_index * n  # a process holds a slice, which may begin within a group
        ids = torch.arange(first, first + n, device=output["completion_ids"].device) // count
        # another class may have dropped or repeated rows
        output[_GROUP_IDS] = ids if n == len(inputs) and _fits(output, ids) else prompt_groups(output)
        return output

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, but for the shuffle before the split into micro-batches: whole groups in place of responses."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        cycle = self.args.steps_per_generation * self.num_iterations
        if self._step % cycle == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            if not _fits(batch, batch.get(_GROUP_IDS)):
                batch[_GROUP_IDS] = prompt_groups(batch)
            batch = trl_utils.split_pixel_values_by_grid(batch)
            batch = shuffle_groups(batch, batch[_GROUP_IDS])
            batches = trl_utils.split_tensor_dict(batch, self.args.steps_per_generation)
            self._buffered_inputs = [trl_utils.unsplit_pixel_values_by_grid(part) for part in batches]
        inputs = dict(self._buffered_inputs[self._step % self.args.steps_per_generation])
        if self._shared is not None:
            inputs["advantages"] = self._shared.advantages(inputs["advantages"])
        self._group_ids = inputs[_GROUP_IDS]
        return inputs

    # -- two streams in place of one -----------------------------------------------------------------------------

    @property
    def beta(self) -> Any:
        """The KL coefficient; a leaf of the loss's graph while a training step takes the loss apart."""
        return self._beta if self._shared is None else self._shared.beta(self._beta)

    @beta.setter
    def beta(self, value: Any) -> None:
        self._beta = float(value)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._note_groups(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self._note_groups(inputs)
        return super()._compute_loss(model, inputs)

    def _note_groups(self, inputs: Any) -> None:
        """The groups of the rows that the loss is of: a subclass may have dropped or repeated some."""
        if self._shared is not None and _GROUP_IDS in inputs:
            self._group_ids = inputs[_GROUP_IDS]

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        compute = super()._get_per_token_logps_and_entropies
        if self._shared is None or not torch.is_grad_enabled():
            return compute(*args, **kwargs)
        return self._shared.logps(compute, *args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        # Trainer.training_step ends in accelerator.backward(loss), with no hook before it
        self._follow_frozen()
        self._shared, self._group_ids = SharedForward(model, self.model, self.model_wrapped), None
        try:
            with _replaced(self.accelerator, backward=self._accumulate):
                return cast(Tensor, super().training_step(model, inputs, num_items_in_batch))
        finally:
            self._shared = None

    def _accumulate(self, loss: Tensor, **_: Any) -> None:
        assert self._shared is not None
        assert self.method is not None
        logp, plasticity, stability = self._shared.cotangents(loss)
        if self._group_ids is None or len(self._group_ids) != len(logp):
            raise ValueError(
                f"compute_loss: {type(self).__name__} gives a loss of {len(logp)} responses, whose groups are not "
                f"known; drop or repeat rows of all tensors in `inputs` alike, {_GROUP_IDS!r} included"
            )
        self.method.accumulate_cotangents(logp, plasticity, stability, group_ids=self._group_ids)
        if self.accelerator.sync_gradients:
            self._resolve(self.method)

    def _resolve(self, method: PCR) -> None:
        self.last_report = method.resolve()
        logged = self.last_report.metrics()
        if self.args.every > 1:
            logged["pcr/measured"] = float(self.last_report.measured)
        if self.args.log_layers:
            logged |= self.last_report.layer_metrics()
        for key, value in logged.items():
            self._metrics["train"][key].append(value)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # before the rest: at its end the trainer deletes older checkpoints, which a kill until then must find
        checkpoints.save(self, os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}"))
        super()._save_checkpoint(model, trial)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        epochs, steps = super()._init_training_state(*args, **kwargs)
        checkpoints.draw_epochs(self._sampler, epochs)
        return epochs, steps

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.refuse_damaged(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoints.restore_weights(self, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        checkpoints.restore_weights(self, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = checkpoints.load(self, checkpoint)
            self._bind(self.model_wrapped).load_state_dict(state)


def _trained(model: Any) -> tuple[bool, ...]:
    return tuple(parameter.requires_grad for parameter in model.parameters())


def prompt_groups(batch: dict[str, Any]) -> Tensor:
    """A number for each different prompt of a generation batch, by its tokens."""
    if any(batch.get(key) is not None for key in ("pixel_values", "num_images", "image_grid_thw")):
        raise ValueError(
            "groups: rows of a generation batch with pictures were dropped or repeated, and prompts with the same text "
            f"may show other ones; give {_GROUP_IDS!r} with the batch"
        )
    prompts = batch["prompt_ids"].masked_fill(batch["prompt_mask"] == 0, -1)
    found: Tensor = torch.unique(prompts, dim=0, return_inverse=True)[1]
    return found


def _fits(batch: dict[str, Any], group_ids: Any) -> bool:
    """Whether rows of one group have one prompt, and there is an id for every row."""
    prompts = batch["prompt_ids"].masked_fill(batch["prompt_mask"] == 0, -1)
    if not isinstance(group_ids, Tensor) or group_ids.shape != prompts.shape[:1]:
        return False
    _, index = torch.unique(group_ids, return_inverse=True)
    first = torch.full((int(index.max()) + 1,), len(index), device=index.device).scatter_reduce(
        0, index, torch.arange(len(index), device=index.device), "amin"
    )
    return bool((prompts == prompts[first[index]]).all())


def shuffle_groups(batch: dict[str, Any], group_ids: Tensor) -> dict[str, Any]:
    """All sequences of a generation batch in a random order of groups, each group's responses together."""
    ids = torch.unique(group_ids)
    order = ids[torch.randperm(len(ids)).to(ids.device)]
    rows = torch.cat([torch.nonzero(group_ids == q).flatten() for q in order])

    def permute(value: Any) -> Any:
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        return value[rows.to(value.device)] if isinstance(value, Tensor) else [value[i] for i in rows.tolist()]

    return {key: permute(value) for key, value in batch.items()}


@contextmanager
def _replaced(accelerator: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """The accelerator with other methods."""
    for name, method in methods.items():
        setattr(accelerator, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(accelerator, name)
