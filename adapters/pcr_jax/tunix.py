"""PCR as a policy loss of google-tunix: import this module, then `GRPOConfig(policy_loss_fn="pcr")`.

Tunix differentiates a registered loss and hands the gradient to its optimizer; that of this loss is the resolved
update. Both streams come from tunix's own GRPO loss, as a function of the log-probabilities, once with its KL term and
once without, so that KL estimators, clamps, dual clipping, sampler weights and ways to average are tunix's own.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pcr_core
from pcr_core import Rule, needs_noise
from pcr_core.rules import require_rule
from pcr_jax.blocks import Blocks, Granularity, Selector, select_blocks
from pcr_jax.pullback import Norms, pullback
from pcr_jax.resolve import resolve
from pcr_jax.temporal import is_temporal

try:
    from flax import nnx
    from tunix.rl import algo_core, common, function_registry
    from tunix.sft.peft_trainer import PeftTrainer
    from tunix.sft.utils import is_lora_enabled
except ImportError as error:
    raise ImportError("pcr_jax.tunix needs google-tunix: pip install google-tunix==0.1.7") from error

METRICS = ("pcr/conflict_rate", "pcr/kl_coefficient")


def register(
    name: str = "pcr",
    *,
    rule: Rule = pcr_core.PCR(),
    blocks: Blocks | Selector = "mlp",
    granularity: Granularity = "tensor",
    norms: Norms = "auto",
    groups_at_once: int | None = None,
) -> Callable[..., Any]:
    """A policy loss under that name in tunix's registry, for `GRPOConfig(policy_loss_fn=name)`; returns it.

    Args:
        name: a name that is registered already is overwritten.
        rule: any `pcr_core.Rule` without a state of its own.
        blocks: see `pcr_jax.select_blocks`; of a model with LoRA the adapters are all that is trained.
        granularity: the same.
        norms: see `pcr_jax.pullback`. The noise is measured where the rule needs it.
        groups_at_once: groups in one forward pass; all of the batch by default, as tunix does. With fewer, or where
            the noise takes the loop, the batch goes through the model once more.

    Raises:
        ValueError, TypeError: for options; and when a batch is traced, for beta=0, packed sequences, rows that are not
            whole groups, and micro-batches (`train_micro_batch_size` below `mini_batch_size`), whose gradients tunix
            would average after each was resolved, which is another estimator.
    """
    require_rule(rule)
    if is_temporal(rule):
        raise ValueError(f"rule={rule!r}: a loss of tunix keeps no state between steps; use another prior")

    def pcr_loss(
        model: Any, train_example: Any, algo_config: Any, pad_id: int, eos_id: int, **_: Any
    ) -> tuple[Any, dict[str, Any]]:
        group = _check(train_example, algo_config)
        _check_trainer()
        graphdef, params, rest = nnx.split(model, nnx.LoRAParam if is_lora_enabled(model) else nnx.Param, ...)
        chosen = blocks if isinstance(blocks, Blocks) else select_blocks(params, blocks, granularity)
        rows = {"prompt": train_example.prompt_ids, "completion": train_example.completion_ids}
        n, length = rows["completion"].shape
        without_kl = copy.copy(algo_config)
        without_kl.beta = 0.0

        def logp_fn(params: Any, rows: Any) -> Any:
            logp, logits = common.compute_per_token_logps(
                graphdef,
                nnx.merge_state(params, rest),
                rows["prompt"],
                rows["completion"],
                pad_id=pad_id,
                eos_id=eos_id,
                stop_gradient=False,
                return_logits=True,
                temperature=algo_config.temperature,
            )
            entropy = algo_core.compute_entropy_from_logits(jax.lax.stop_gradient(logits))  # a metric of tunix's
            return jnp.concatenate([logp.astype(jnp.float32), entropy.astype(jnp.float32)], axis=1)

        def loss_of(both: Any, config: Any = algo_config) -> Any:
            return _grpo_loss(both[:, :length], both[:, length:], train_example, config, pad_id, eos_id)

        def cotangents_of(both: Any) -> tuple[Any, Any]:
            whole = jax.grad(loss_of, has_aux=True)(both)[0]
            plasticity = jax.grad(lambda x: loss_of(x, without_kl)[0])(both)
            return plasticity, whole - plasticity

        def evaluate(params: Any) -> tuple[Any, dict[str, Any]]:
            loss, aux = loss_of(logp_fn(params, rows))
            return loss, {**aux, **dict.fromkeys(METRICS, jnp.float32(np.nan))}  # no gradient, nothing to resolve

        def forward(params: Any) -> tuple[Any, Any]:
            # of the whole batch; XLA drops this pass where the pullback sees the whole batch at once
            first_p, first_s = cotangents_of(logp_fn(params, rows))

            def cotangents(both: Any, some: Any) -> tuple[Any, Any]:
                return cotangents_of(both) if both.shape[0] == n else (some["p"], some["s"])

            measured = needs_noise(rule)
            pulled = pullback(
                logp_fn,
                params,
                {**rows, "p": first_p, "s": first_s},
                cotangents,
                blocks=chosen,
                group_size=group,
                norms=norms,
                groups_at_once=n // group if groups_at_once is None else groups_at_once,
                noise=measured,
            )
            scatter = pulled.scatter() if measured else None
            update, report = resolve(pulled.plasticity, pulled.stability, scatter, rule, blocks=chosen)
            loss, aux = loss_of(pulled.logp)
            aux["pcr/conflict_rate"] = jnp.mean(report.weights.conflict.astype(jnp.float32))
            aux["pcr/kl_coefficient"] = jnp.mean(report.weights.stability.astype(jnp.float32))
            return (loss, aux), jax.tree.map(lambda u, like: u.astype(like.dtype), update, params)

        loss = jax.custom_vjp(evaluate)
        loss.defvjp(forward, lambda update, got: (jax.tree.map(lambda u: (got[0] * u).astype(u.dtype), update),))
        result: tuple[Any, dict[str, Any]] = loss(params)
        return result

    function_registry.register_policy_loss_fn(name)(pcr_loss)
    return pcr_loss


def _check(example: Any, config: Any) -> int:
    if not config.beta:
        raise ValueError(
            "pcr: beta is 0, so there is no stability gradient to resolve; set GRPOConfig(beta=...) or use "
            "policy_loss_fn='grpo'"
        )
    if example.ref_per_token_logps is None:
        raise ValueError("pcr: the batch holds no log-probabilities of the reference model (ref_per_token_logps)")
    if getattr(example, "segment_ids", None) is not None:
        raise ValueError(
            "pcr: sequence packing (max_seq_token_per_tpu) puts several responses into a row, whose gradients cannot "
            "be told apart; switch it off"
        )
    group, rows = int(config.num_generations), example.completion_ids.shape[0]
    if rows % group:
        raise ValueError(f"pcr: a batch of {rows} rows is not whole groups of num_generations={group}")
    return group


def _check_trainer() -> None:
    """Of the tunix trainer whose step is being traced: refuse micro-batches, and have our metrics logged.

    A loss is not told who trains with it, so that it has to look for the caller; none is found in a user's own loop.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, PeftTrainer):
            break
        frame = frame.f_back
    else:
        return
    steps = trainer.config.get_with_default("gradient_accumulation_steps", 1)
    if steps > 1:
        raise ValueError(
            f"pcr: tunix averages the gradients of {steps} micro-batches after each was resolved by itself, which is "
            "another estimator than PCR of the mini-batch; set train_micro_batch_size=mini_batch_size (memory: "
            "pcr_jax.tunix.register(groups_at_once=1))"
        )
    if hasattr(trainer, "rl_metrics_to_log"):
        trainer.with_rl_metrics_to_log({**trainer.rl_metrics_to_log, **dict.fromkeys(METRICS, np.mean)})


def _grpo_loss(logp: Any, entropy: Any, example: Any, config: Any, pad_id: int, eos_id: int) -> Any:
    """Tunix's own loss and metrics as a function of log-probabilities."""
    given = {
        "common": SimpleNamespace(
            compute_per_token_logps=lambda *a, **k: (logp, entropy),
            aggregate_loss=common.aggregate_loss,
            compute_kl_divergence=common.compute_kl_divergence,
        ),
        "compute_entropy_from_logits": lambda entropy: entropy,
    }
    # a copy with globals of its own: to exchange those of the module would reach tunix's other threads
    loss = FunctionType(
        algo_core.grpo_loss_fn.__code__, {**algo_core.grpo_loss_fn.__globals__, **given}, "grpo_loss_fn"
    )
    return loss(nnx.Dict(), example, config, pad_id, eos_id)


register()
