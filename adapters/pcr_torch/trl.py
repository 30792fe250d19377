"""PCR as a drop-in for TRL's GRPO: `PCRTrainer` and `PCRConfig` in place of `GRPOTrainer` and `GRPOConfig`.

The losses stay TRL's own, or a subclass's. One evaluation gives both cotangents of every loss that is the sum of a
reward and a KL term (`shared_forward.py`); then two backward passes take the place of one, and `.grad` is written when
gradients synchronise.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
import transformers.trainer
from torch import Tensor

from pcr_core.statistics import Strata
from pcr_torch import checkpoints
from pcr_torch.baseline import Applied
from pcr_torch.blocks import FrozenBlocks, Granularity, select_blocks
from pcr_torch.carried_state import carry, state_of
from pcr_torch.distributed import kept_whole, sharded_modules
from pcr_torch.groups import Text, owners, shuffle_groups, texts, texts_of
from pcr_torch.lent_batch import lent, lowered
from pcr_torch.method import PCR, Norms
from pcr_torch.pullback import total_dtype
from pcr_torch.report import Report
from pcr_torch.separability import compiler_of, refuse_config, refuse_frozen_within, refuse_noise, refuse_trainer
from pcr_torch.shared_forward import Ones, SharedForward
from pcr_torch.terms import is_reentrant, leaves

try:
    import trl.trainer.grpo_trainer as stock
    from accelerate import DistributedType
    from trl import GRPOTrainer

    from pcr_torch.trl_config import PCRConfig
except ImportError as error:
    raise ImportError("pcr_torch.trl needs TRL 1.16: pip install 'pcr-grpo[trl]'") from error

__all__ = ["PCRConfig", "PCRTrainer"]

_GROUP_IDS, _TEXTS = "pcr_group_ids", "pcr_texts"
_LENGTH = 1024  # unit of lengths where none is the longest
_REQUEST = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[1:]

_log = logging.getLogger("pcr_torch")


class PCRTrainer(GRPOTrainer):  # type: ignore[misc]
    """`trl.GRPOTrainer` whose update resolves the conflict of reward and KL. Same arguments; `args` is a `PCRConfig`.

    Every optimizer step logs `pcr/conflict_rate`, `pcr/cosine`, `pcr/alpha`, `pcr/boost`, `pcr/removed`, both gradient
    norms and both noise-to-signal ratios; `last_report` holds the full `pcr_torch.Report`. Checkpoints carry the
    temporal prior's state.

    Runs on one process or several, with DDP or FSDP2 (`fsdp_version: 2`): each process logs the same `pcr/` metrics, of
    all processes. `method` is made whenever training starts, from the model as the accelerator prepared it, and gives
    the model's layers their own forward back when training ends; it is made again where layers are frozen or trained in
    turns. Checkpoints hold whole tensors, so PCR's part of them can be resumed on another number of processes.

    Raises:
        TypeError: `args` is not a PCRConfig.
        ValueError: a setting under which the two gradients cannot be told apart, with the reason.
    """

    _tag_names = ("trl", "grpo", "pcr")
    _metrics: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if not isinstance(config, PCRConfig):
            raise TypeError(f"args: expected a pcr_torch.trl.PCRConfig (with beta > 0), got {type(config).__name__}")
        config.check()  # options may be set after a config was made
        refuse_config(config)
        if config.torch_compile:
            refuse_noise(config, "torch_compile")
        _without_reentrant(config)
        self._sampler: Any = None  # of prompts, in training; None for a stream of them
        self._shared: SharedForward | None = None  # while a loss is evaluated
        # until its backward pass: what a loss is given, its texts and groups, and with a baseline its advantages
        self._pending: tuple[SharedForward, tuple[list[Text], list[int]], tuple[Applied, list[Text]] | None] | None
        self._pending = None
        self._ones: Ones | None = None
        self._training = False
        self._accumulated = False  # whether this step has a micro-batch
        self._generated: list[Text] = []
        self.reference_digests: dict[str, str] | None = None  # taken at the first checkpoint
        super().__init__(*args, **kwargs)
        refuse_trainer(self)
        self._compiler = compiler_of(self.accelerator)
        if self._compiler is not None:
            _without_noise(config, self._compiler)
        self.method: PCR | None = None
        self._bound: Any = None
        self._trained: tuple[bool, ...] = ()
        self._late = False  # whether layers were unfrozen within a step
        self._resumed: dict[str, Any] | None = None  # of a checkpoint, until the first step
        self._plain = False  # whether all blocks are frozen for the time being
        try:
            if self.accelerator.distributed_type == DistributedType.NO:
                self._bind(self.model)
                self._release()  # it was made to be told early what cannot be
            else:  # the accelerator wraps the model, or replaces its parameters, when training starts
                select_blocks(self.model, config.blocks, cast(Granularity, config.granularity))
        except FrozenBlocks as error:
            raise ValueError(
                f"{error}. To unfreeze layers in turns, freeze them once training has begun, such as in a callback's "
                "on_train_begin: until one of the blocks is trained, what is trained takes the plain sum"
            ) from error
        self.last_report: Report | None = None
        for name in ("training_step", "compute_loss"):  # the most derived class's
            setattr(self, name, self._only_while_training(name, getattr(self, name)))

    # -- bound to the model while it is trained --------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's. The model's layers have their own forward again when it ends, whichever way.

        A damaged checkpoint is refused by the name of its file; `resume_from_checkpoint=True` takes the newest whole
        one of the output folder.
        """
        checkpoint = checkpoints.chosen(self, resume_from_checkpoint)
        watched, stepping = self._watched(self.compute_loss), self._stepping(self.training_step)
        self._training = True
        try:
            # a training step evaluates compute_loss and ends in accelerator.backward(loss), with no hook between
            with (
                _replaced(self, compute_loss=watched, training_step=stepping),
                _replaced(self.accelerator, backward=self._accumulate),
                _kept_buffers() if self._compiler is not None else nullcontext(),
            ):
                return super().train(checkpoint, *args, **kwargs)
        finally:
            self._training = False
            self._release()

    def _only_while_training(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if not self._training and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name} outside of train(): a backward pass of it would be plain GRPO's, since both "
                    "gradients are taken while trainer.train() runs. Call that, under torch.no_grad() for the loss's "
                    "value alone, or use pcr_torch.PCR in a loop of your own (docs/pytorch.md)"
                )
            return method(*args, **kwargs)

        return called

    def _release(self) -> None:
        self._pending, self._accumulated, self._bound = None, False, None
        if self.method is not None:
            self.method.discard()  # a training that was interrupted may have left a micro-batch behind
            self.method.remove()

    def _bind(self, model: Any) -> PCR:
        """PCR of the prepared model; a new one, with what is known of its blocks, where another was bound."""
        if self.method is not None and self._bound is model:
            return self.method
        config, state = self.args, self._resumed
        if self.method is not None:
            self._release()
            state = state or state_of(self.method, self._selection)
        self._bound, self._trained = model, _trained(model)
        self.method = PCR(
            model,
            blocks=config.blocks,
            granularity=cast(Granularity, config.granularity),
            rule=config.make_rule(),
            strata=cast(Strata, config.strata),
            norms=cast(Norms, config.norms),
            noise_every=config.noise_every,
            every=config.every,
            baseline=config.baseline,
            baseline_memory=config.baseline_memory,
        )
        if state is not None:
            carry(state, self.method, self._selection)
        return self.method

    @property
    def _selection(self) -> tuple[str, str]:
        return self.args.blocks, self.args.granularity

    def _follow_frozen(self) -> None:
        """Bind again where layers were frozen or trained in turns since the last step."""
        if self._bound is None:
            return
        before, now = self._trained, _trained(self._bound)
        if self._accumulated:
            if before != now:
                refuse_frozen_within(self._bound, before, now)
                _log.warning(
                    "layers were unfrozen between the micro-batches of a step: their gradients of this step are the "
                    "plain sum, and their blocks begin with the next one"
                )
                self._trained, self._late = now, True
        elif before != now or self._late:
            bound, self._bound, self._late = self._bound, None, False
            try:
                self._bind(bound)
                self._plain = False
            except FrozenBlocks as error:
                self._plain, self._bound, self._trained = True, bound, now
                _log.warning("%s. Until then what is trained takes the plain sum, without pcr/ metrics", error)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._pending, self._accumulated = None, False
        self._bind(self.model_wrapped).discard()  # where the batch did not fit, this is another try within one `train`
        return prepared

    # -- groups stay whole ---------------------------------------------------------------------------------------

    def _generate(self, prompts: Any) -> Any:
        output = super()._generate(prompts)
        self._generated = texts(output[0], output[1], self._tokenizer.pad_token_id)
        return output

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self._generated = []
        output = super()._generate_and_score_completions(inputs)
        count = self.num_generations if self.model.training else self.num_generations_eval
        n = len(self._generated)
        first = self.accelerator.process_index * n  # a process holds a slice, which may begin within a group
        ids = [row // count for row in range(first, first + n)]
        return self._with_groups(output, self._generated, ids)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, but for the shuffle before the split into micro-batches: whole groups in place of responses."""

        def shuffle(batch: dict[str, Any]) -> dict[str, Any]:
            batch = self._with_groups(batch, *_carried(batch))
            return shuffle_groups(batch, batch[_GROUP_IDS])

        with _replaced(stock, shuffle_sequence_dict=shuffle):
            return super()._prepare_inputs(generation_batch)

    def _with_groups(self, batch: dict[str, Any], known: list[Text], ids: list[int]) -> dict[str, Any]:
        """The batch with each row's group and texts, where `known` texts are of the groups `ids`."""
        rows = self._texts_of(batch)
        device = batch["completion_ids"].device
        groups = owners(rows, known, ids, by_prompt=batch.get("pixel_values") is None)
        return {**batch, _GROUP_IDS: torch.tensor(groups, device=device), _TEXTS: torch.tensor(rows, device=device)}

    # -- two streams in place of one -----------------------------------------------------------------------------

    @property
    def beta(self) -> float:
        """The KL coefficient; while a loss is evaluated, tagged, so that its KL term can be told."""
        return self._beta if self._shared is None else self._shared.beta(self._beta)

    @beta.setter
    def beta(self, value: float) -> None:
        self._beta = float(value)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; within a loss, of the trained model, one forward pass a text, whose graph is kept for the streams."""
        real = super()._get_per_token_logps_and_entropies
        request = dict(zip(_REQUEST, args, strict=False)) | kwargs  # classes below may take *args, **kwargs
        plain = partial(self.accelerator.unwrap_model, keep_torch_compile=False)
        if self._shared is None or not torch.is_grad_enabled() or plain(request["model"]) is not plain(self.model):
            return real(*args, **kwargs)
        entropies = request.pop("compute_entropy", False)
        with_router = request.pop("compute_aux_loss", False)
        request["compute_aux_loss"] = with_router or self.aux_loss_enabled  # one forward pass, whoever asks first
        left_out = ("model", "batch_size")  # the batch size changes no value
        key = {k: v for k, v in request.items() if k not in left_out and v is not None and v is not False}
        key["state"] = _state(self.model)
        cut = self._shared.find(key)
        if cut is None:
            logp, entropy, router = real(**request, compute_entropy=True)
            if not logp.requires_grad:  # a reference that is the model without its adapters
                return logp, entropy if entropies else None, router if with_router else None
            cut = self._shared.cut(key, logp, entropy, router)
        return cut.leaf, cut.entropies if entropies else None, cut.router_leaf if with_router else None

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        if self._shared is None:
            return super()._compute_loss(model, inputs)
        if not isinstance(inputs.get("advantages"), Tensor):
            raise ValueError(
                "inputs: the batch has no tensor 'advantages', by which the reward's term is told; keep it"
            )
        if self._shared.advantages(inputs["advantages"]) is inputs["advantages"]:
            return super()._compute_loss(model, inputs)
        if self.args.baseline is not None:
            raise ValueError(
                "baseline: a class above puts advantages of its own in the batch's place within its loss, after the "
                "baseline was subtracted; make them in the reward functions, or do without the baseline"
            )
        with lent(inputs, self._shared.advantages, ()):  # a class above has put others in their place
            return super()._compute_loss(model, inputs)

    def _stepping(self, training_step: Callable[..., Any]) -> Callable[..., Any]:
        """The most derived class's step; it may have left out the backward pass of the last micro-batch."""

        def stepping(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            self._pending = None
            if self.accelerator.sync_gradients:
                self._finish()
            return loss

        return stepping

    def _watched(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        """The most derived class's loss, in training evaluated so that `_accumulate` can take it apart."""

        def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return compute_loss(model, inputs, *args, **kwargs)
            self._follow_frozen()
            if self._ones is None:
                dtype = total_dtype(next(p for p in self.model.parameters() if p.requires_grad))
                self._ones = Ones(self.accelerator.device, dtype)
            self._shared = shared = SharedForward(self._ones)
            applied = self._applied(inputs)
            self._pending = shared, _carried(inputs), applied
            try:
                with (
                    nullcontext() if applied is None else lowered(inputs, applied[0][0]),
                    lent(inputs, shared.advantages, (_GROUP_IDS, _TEXTS)),
                ):
                    loss = compute_loss(model, inputs, *args, **kwargs)
                shared.returned(loss)
                return loss
            finally:
                self._shared = None

        return watched

    def _applied(self, inputs: dict[str, Any]) -> tuple[Applied, list[Text]] | None:
        """With a baseline: the advantages lowered by it, each response's weight in it, and the texts they belong to."""
        method = self.method
        if self.args.baseline is None or method is None or self._plain:
            return None
        advantages, mask = inputs.get("advantages"), inputs["completion_mask"]
        if not isinstance(advantages, Tensor) or advantages.ndim != 1:
            raise ValueError("baseline: it shifts advantages of responses, so inputs['advantages'] has to be (n,)")
        weight = None
        if self.args.loss_type == "grpo":  # divides by the response's length
            tokens = mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]
            weight = tokens.sum(dim=1) / (self.args.max_completion_length or _LENGTH)
        return (method.shifted(advantages, weight), weight), self._texts_of(inputs)

    def _texts_of(self, rows: dict[str, Any]) -> list[Text]:
        return texts_of(rows["prompt_ids"], rows["prompt_mask"], rows["completion_ids"], self._tokenizer.pad_token_id)

    def _accumulate(self, loss: Tensor, **kwargs: Any) -> None:
        """In place of `accelerator.backward`."""
        assert self.method is not None
        if self._pending is None or self._shared is not None or not self._pending[0].made(loss):
            self._backward_of_another(loss, **kwargs)
            return
        (shared, carried, applied), self._pending = self._pending, None
        loss = loss / self.accelerator.gradient_accumulation_steps
        streams = shared.streams(loss, self.model, sharded=self.is_fsdp_enabled, beta=self._beta)
        if streams is not None:
            request = streams.cut.request
            ids, mask, kept = request["input_ids"], request["attention_mask"], request["logits_to_keep"]
            rows = {"prompt_ids": ids[:, :-kept], "prompt_mask": mask[:, :-kept], "completion_ids": ids[:, -kept:]}
            rows["pixel_values"] = request.get("pixel_values")
            group_ids = self._with_groups(rows, *carried)[_GROUP_IDS]
            logp, plasticity, stability = streams.cut.logp, streams.plasticity, streams.stability
            if self.args.norms != "fast" and self.args.noise_every != 0 and is_reentrant(logp):
                raise ValueError(
                    "model: a reentrant checkpoint (torch.utils.checkpoint with use_reentrant=True) hides which "
                    "response a row of an activation belongs to; set use_reentrant=False, norms='fast' if "
                    "activations are (responses, tokens, features) throughout, or noise_every=0 to do without"
                )
            if streams.router is not None and streams.cut.router is not None:
                self._add_router(streams.cut.router, streams.router)
            if self._plain:
                torch.autograd.backward(logp, plasticity + stability)
            else:
                (advantages, weight), given = applied or ((None, None), [])
                if applied is not None and self._texts_of(rows) != given:
                    raise ValueError(
                        "baseline: rows were dropped, repeated, moved or rewritten within the loss, so it is not known "
                        "which advantage each was given; change the batch before compute_loss, or do without baseline"
                    )
                self.method.accumulate_cotangents(
                    logp, plasticity, stability, group_ids=group_ids, advantages=advantages, weight=weight
                )
            self._accumulated, self._resumed = True, None
        elif self.accelerator.num_processes > 1:
            raise ValueError(
                "loss: it does not depend on the model, and on several processes all take part in a step; return 0 * "
                "loss to leave a micro-batch out"
            )
        if self.accelerator.sync_gradients:
            self._finish()

    def _add_router(self, loss: Tensor, weight: Tensor) -> None:
        """The gradient of a router loss, of neither stream, to .grad of all that is trained, where `resolve` adds."""
        if loss.requires_grad:
            with kept_whole(sharded_modules(self.model)):
                torch.autograd.backward(loss, weight, retain_graph=True)

    def _finish(self) -> None:
        """The gradients of a step, from all of its micro-batches."""
        accumulated, self._accumulated = self._accumulated, False
        if accumulated and not self._plain and self.method is not None:
            self._resolve(self.method)

    def _backward_of_another(self, loss: Tensor, **kwargs: Any) -> None:
        """Of a loss that another model is trained with, such as a critic."""
        trained = {id(p) for p in self.model.parameters()}
        if any(id(leaf) in trained for leaf in leaves(loss)):
            raise ValueError("loss: it trains the model and does not come from self.compute_loss(model, inputs)")
        if self._pending is not None and self._pending[0].trains(loss):
            raise ValueError(
                "loss: a backward pass of it is asked for before compute_loss has returned, or it is not the loss "
                "that was returned; return the whole of it, and leave its backward pass to training_step"
            )
        type(self.accelerator).backward(self.accelerator, loss, **kwargs)

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
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        checkpoints.save(self, folder)
        rotate, late = transformers.trainer.rotate_checkpoints, []
        with _replaced(transformers.trainer, rotate_checkpoints=lambda *args, **kwargs: late.append((args, kwargs))):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes files of its own
        if self.args.should_save:  # older checkpoints go when this one is known to be whole
            checkpoints.finish(folder, lambda: [rotate(*args, **kwargs) for args, kwargs in late])

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        epochs, steps = super()._init_training_state(*args, **kwargs)
        checkpoints.draw_epochs(self._sampler, epochs)
        return epochs, steps

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoints.restore_weights(self, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if not os.path.isdir(best):
            raise ValueError(f"load_best_model_at_end: {best}, which holds the best model, is not there any more")
        checkpoints.refuse_damaged(best)
        super()._load_best_model()
        checkpoints.restore_weights(self, best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._resumed = checkpoints.load(self, checkpoint)
            carry(self._resumed, self._bind(self.model_wrapped), self._selection)


def _carried(batch: dict[str, Any]) -> tuple[list[Text], list[int]]:
    """Texts and groups that came with a batch; none where they do not belong together."""
    known, ids = batch.get(_TEXTS), batch.get(_GROUP_IDS)
    if known is None or ids is None or len(known) != len(ids):
        return [], []
    return [(prompt, response) for prompt, response in known.tolist()], ids.tolist()


def _without_reentrant(config: PCRConfig) -> None:
    """Reentrant checkpointing hides which response a row belongs to; the other kind has the same gradients."""
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        options = getattr(config, name, None) or {}
        if options.get("use_reentrant"):
            setattr(config, name, {**options, "use_reentrant": False})
            _log.warning(
                "%s: use_reentrant=True hides which response a row of an activation belongs to; taking False, which "
                "has the same gradients", name,
            )  # fmt: skip


def _without_noise(config: PCRConfig, compiler: str) -> None:
    refuse_noise(config, compiler)
    if config.noise_every is None:
        config.noise_every = 0
        _log.warning(
            "%s: in a compiled model the noise of the gradients is not measured; taking noise_every=0", compiler
        )


@contextmanager
def _kept_buffers() -> Iterator[None]:
    """Whatever is compiled keeps what a second backward pass needs.

    Inductor writes into "donated" buffers in the first. Neither its cache on disk nor what this process has compiled
    before knows whether it did, so both are left aside.
    """
    functorch, inductor = (import_module(name) for name in ("torch._functorch.config", "torch._inductor.config"))
    torch._dynamo.reset()
    with functorch.patch(donated_buffer=False), inductor.patch(fx_graph_cache=False):
        yield


def _state(model: Any) -> list[Any]:
    """What decides on a model's output besides its weights: dropout, and which adapters are on."""
    adapters = [m for m in model.modules() if hasattr(m, "_disable_adapters")]  # of PEFT
    return [model.training, *((m._disable_adapters, m._active_adapter) for m in adapters)]


def _trained(model: Any) -> tuple[bool, ...]:
    return tuple(parameter.requires_grad for parameter in model.parameters())


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """An object (or module) with other attributes of its own."""
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)
