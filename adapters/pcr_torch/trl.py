"""PCR as a drop-in for TRL's GRPO: `PCRTrainer` and `PCRConfig` in place of `GRPOTrainer` and `GRPOConfig`.

The losses stay TRL's own. Its `_compute_loss` is run on one forward pass's log-probabilities with beta = 0 (the
plasticity loss) and with zero advantages (the stability loss), which gives both cotangents for every loss type that is
a sum of the two; then two backward passes take the place of one, and `.grad` is written when gradients synchronise.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.autograd.graph import Node

import pcr_core
from pcr_core.projection import Conflict, Gate, Update
from pcr_core.statistics import Strata
from pcr_torch import checkpoints
from pcr_torch.blocks import Granularity, select_blocks
from pcr_torch.method import PCR, Norms
from pcr_torch.report import Report
from pcr_torch.rows import is_leaf
from pcr_torch.separability import NEITHER, refuse_beta, refuse_config, refuse_loss, refuse_trainer

try:
    import trl.trainer.utils as trl_utils
    from accelerate import DistributedType
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError("pcr_torch.trl needs TRL 1.16: pip install 'pcr-grpo[trl]'") from error

_GROUP_IDS = "pcr_group_ids"


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
    all processes. `method` is made when training starts, from the model as the accelerator prepared it (on one process
    at once). Checkpoints hold whole tensors, so PCR's part of them can be resumed on another number of processes.

    Raises:
        TypeError: `args` is not a PCRConfig.
        ValueError: a setting under which the two gradients cannot be told apart, with the reason.
    """

    _tag_names = ("trl", "grpo", "pcr")
    beta: float
    _metrics: Any
    _step: int
    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if not isinstance(config, PCRConfig):
            raise TypeError(f"args: expected a pcr_torch.trl.PCRConfig (with beta > 0), got {type(config).__name__}")
        refuse_config(config)
        self._sampler: Any = None  # of prompts, in training; None for a stream of them
        super().__init__(*args, **kwargs)
        refuse_trainer(self)
        self.method: PCR | None = None
        self._bound: Any = None
        if self.accelerator.distributed_type == DistributedType.NO:
            self._bind(self.model)
        else:  # the accelerator wraps the model, or replaces its parameters, when training starts
            select_blocks(self.model, config.blocks, cast(Granularity, config.granularity))
        self.last_report: Report | None = None
        self._shared: _SharedForward | None = None
        self._streams: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    # -- bound to the model as it is trained -----------------------------------------------------------------------

    def _bind(self, model: Any) -> PCR:
        """PCR of the prepared model; a new one, with the old one's state, where `train` wrapped the model again."""
        if self.method is not None and self._bound is model:
            return self.method
        config, state = self.args, None
        if self.method is not None:
            state = self.method.state_dict()
            self.method.remove()
        self._bound = model
        self.method = PCR(
            model,
            blocks=config.blocks,
            granularity=cast(Granularity, config.granularity),
            rule=config.make_rule(),
            strata=cast(Strata, config.strata),
            norms=cast(Norms, config.norms),
            every=config.every,
        )
        if state is not None:
            self.method.load_state_dict(state)
        return self.method

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
        output[_GROUP_IDS] = torch.arange(first, first + n, device=output["completion_ids"].device) // count
        return output

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, but for the shuffle before the split into micro-batches: whole groups in place of responses."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        cycle = self.args.steps_per_generation * self.num_iterations
        if self._step % cycle == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            batch = trl_utils.split_pixel_values_by_grid(batch)
            batch = shuffle_groups(batch, batch[_GROUP_IDS])
            batches = trl_utils.split_tensor_dict(batch, self.args.steps_per_generation)
            self._buffered_inputs = [trl_utils.unsplit_pixel_values_by_grid(part) for part in batches]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # -- two streams in place of one -----------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss; in training also keeps both cotangents for the backward passes."""
        if not self.model.training:
            return cast(Tensor, super().compute_loss(model, inputs, return_outputs, num_items_in_batch))
        inputs = dict(inputs)
        group_ids = inputs.pop(_GROUP_IDS)
        self._shared = _SharedForward()
        beta, metrics = self.beta, self._metrics
        try:
            loss: Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            whole = self._shared.cotangent(loss)
            self._metrics = defaultdict(lambda: defaultdict(list))  # the next two passes are not to be logged
            still = {**inputs, "advantages": torch.zeros_like(inputs["advantages"])}
            with self._unlogged():
                self.beta = 0.0
                plasticity = self._shared.cotangent(super().compute_loss(model, inputs))
                self.beta = beta
                stability = self._shared.cotangent(super().compute_loss(model, still))
            refuse_loss(whole, plasticity, stability)
            self._streams = (self._shared.logp, plasticity, stability, group_ids)
        finally:
            self.beta, self._metrics, self._shared = beta, metrics, None
        return loss.detach()

    def _unlogged(self) -> AbstractContextManager[None]:
        """Without the collective calls that TRL's metrics make; a quantile of entropies is taken over all processes."""
        if self.args.top_entropy_quantile < 1:
            return nullcontext()
        return _replaced(self.accelerator, gather=lambda tensor: tensor, reduce=lambda tensor, **_: tensor)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self._shared is None:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._shared.result is None:
            self._shared.set(*super()._get_per_token_logps_and_entropies(*args, **kwargs))
        return self._shared.result

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        # Trainer.training_step ends in accelerator.backward(loss), with no hook before it
        with _replaced(self.accelerator, backward=self._accumulate):
            return cast(Tensor, super().training_step(model, inputs, num_items_in_batch))

    def _accumulate(self, loss: Tensor, **_: Any) -> None:
        assert self._streams is not None
        assert self.method is not None
        if loss.requires_grad:
            raise ValueError(f"compute_loss: {type(self).__name__} adds a term to the loss, and {NEITHER}")
        logp, plasticity, stability, group_ids = self._streams
        self._streams = None
        self.method.accumulate_cotangents(logp, plasticity, stability, group_ids=group_ids)
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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = checkpoints.load(self, checkpoint)
            self._bind(self.model_wrapped).load_state_dict(state)


class _SharedForward:
    """One forward pass for several evaluations of the loss, cut off at the log-probabilities."""

    def __init__(self) -> None:
        self.result: tuple[Tensor, Any, Any] | None = None

    def set(self, logp: Tensor, entropies: Tensor | None, aux_loss: Any) -> None:
        self.logp = logp
        self._leaf = logp.detach().requires_grad_()
        self.result = (self._leaf, None if entropies is None else entropies.detach(), aux_loss)

    def cotangent(self, loss: Tensor) -> Tensor:
        """Of a loss of these log-probabilities and nothing else that is trained."""
        waiting, seen = [cast(Node, loss.grad_fn)], set[Node]()
        while waiting:
            node = waiting.pop()
            seen.add(node)
            if is_leaf(node) and cast(Any, node).variable is not self._leaf:
                raise ValueError(f"loss: a term of it has a forward pass of its own, and {NEITHER}")
            waiting += [after for after, _ in node.next_functions if after is not None and after not in seen]
        return torch.autograd.grad(loss, self._leaf)[0]


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
