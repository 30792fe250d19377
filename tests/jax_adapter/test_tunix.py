"""The policy loss of google-tunix against tunix's own; `make tunix` runs it in an environment of its own."""

import numpy as np
import pytest

pytest.importorskip("tunix", reason="google-tunix needs an environment of its own: make tunix")

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.rl import algo_core, common, function_registry
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig
from tunix.sft.utils import is_lora_enabled

import pcr_core
import pcr_jax.tunix

N, T, GROUP = 8, 5, 4


def model():
    size = {"num_layers": 2, "vocab_size": 31, "embed_dim": 16, "hidden_dim": 32, "num_heads": 2, "head_dim": 8}
    config = llama.ModelConfig(**size, num_kv_heads=1, rope_theta=10_000, norm_eps=1e-5)
    made = llama.Llama3(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(made)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(params))))
    # tunix's kernels of an MLP begin at zero, where none of them has a gradient
    return nnx.merge(graph, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape, x.dtype), params))


def example(policy, rows=N, seed=0):
    """Every response is far above its reference and to be learned: the streams conflict."""
    r = np.random.default_rng(seed)
    mask = np.ones((rows, T), np.int32)
    mask[3, 3:] = 0
    completion = r.integers(1, 31, (rows, T)) * mask
    prompt = np.repeat(r.integers(1, 31, (rows // GROUP + 1, 4)), GROUP, axis=0)[:rows]
    logp = common.compute_per_token_logps(*nnx.split(policy), prompt, completion, pad_id=0, eos_id=30)
    noise = 0.1 * r.normal(size=(2, rows, T))
    return common.TrainExample(
        prompt_ids=jnp.asarray(prompt),
        prompt_mask=jnp.ones_like(prompt),
        completion_ids=jnp.asarray(completion),
        completion_mask=jnp.asarray(mask),
        advantages=jnp.asarray(r.uniform(0.5, 1.5, rows), jnp.float32),
        ref_per_token_logps=logp - 1 + jnp.asarray(noise[0], jnp.float32),
        old_per_token_logps=logp + jnp.asarray(noise[1], jnp.float32),
    )


def config(**options):
    made = GRPOConfig(**({"num_generations": GROUP, "beta": 0.1, "policy_loss_fn": "pcr"} | options))
    made.temperature, made.kl_clamp_value = 0.9, None  # which a learner sets
    return made


def gradient(loss, policy, batch, options):
    step = nnx.jit(lambda m: nnx.value_and_grad(lambda m: loss(m, batch, options, 0, 30), has_aux=True)(m))
    return jax.tree.map(np.asarray, step(policy))


def distance(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("mode", ["kl", "low_var_kl"])
@pytest.mark.parametrize("aggregate", ["token-mean", "sequence-mean-token-mean"])
@pytest.mark.parametrize("algorithm", ["grpo", "gspo-token"])
def test_the_rule_grpo_is_tunix_own_loss(mode, aggregate, algorithm):
    policy, options = model(), config(kl_loss_mode=mode, loss_agg_mode=aggregate, loss_algo=algorithm)
    batch = example(policy)
    (loss, aux), stock = gradient(algo_core.grpo_loss_fn, policy, batch, options)
    for at_once in (None, 1):
        ours = pcr_jax.tunix.register("test", rule=pcr_core.GRPO(), groups_at_once=at_once)
        (our_loss, our_aux), update = gradient(ours, policy, batch, options)
        assert distance(stock, update) < 1e-6
        assert abs(loss - our_loss) < 1e-6
        assert set(our_aux) == {*aux, *pcr_jax.tunix.METRICS}
        assert all(abs(float(aux[k]) - float(our_aux[k])) < 1e-5 for k in aux)


def test_conflicts_are_resolved_alike_on_both_paths():
    policy, options = model(), config()
    batch = example(policy)
    (_, _), stock = gradient(algo_core.grpo_loss_fn, policy, batch, options)
    updates = []
    for norms in ("fast", "loop"):
        ours = pcr_jax.tunix.register("test", rule=pcr_core.PCR.paper(), norms=norms)
        (_, aux), update = gradient(ours, policy, batch, options)
        assert aux["pcr/conflict_rate"] > 0
        updates.append(update)
    assert distance(updates[0], stock) > 1e-3
    assert distance(*updates) < 1e-6


def test_a_loss_without_a_gradient_has_no_metrics_of_it():
    policy = model()
    loss, aux = pcr_jax.tunix.register("test")(policy, example(policy), config(), 0, 30)
    assert np.isfinite(loss)
    assert np.isnan(aux["pcr/conflict_rate"])


def test_what_is_another_estimator_is_refused():
    policy = model()
    batch, ours = example(policy), pcr_jax.tunix.register("test")
    with pytest.raises(ValueError, match="beta is 0"):
        ours(policy, batch, config(beta=0.0), 0, 30)
    with pytest.raises(ValueError, match="not whole groups"):
        ours(policy, example(policy, rows=6), config(), 0, 30)
    with pytest.raises(ValueError, match="sequence packing"):
        ours(policy, batch.replace(segment_ids=batch.completion_ids), config(), 0, 30)
    with pytest.raises(ValueError, match="no state between steps"):
        pcr_jax.tunix.register("test", rule=pcr_core.PCR(alpha="snr", prior=pcr_core.TemporalPrior()))


def test_the_pass_before_the_pullback_is_compiled_only_where_it_is_needed():
    policy, options = model(), config()
    batch, (graph, params) = example(policy), nnx.split(policy)

    def products(function):
        return jax.jit(function).lower(params).compile().as_text().count(" dot(")

    def step(ours):
        return lambda p: nnx.value_and_grad(lambda m: ours(m, batch, options, 0, 30), has_aux=True)(nnx.merge(graph, p))

    def forward(p):
        return algo_core.grpo_loss_fn(nnx.merge(graph, p), batch, options, 0, 30)

    whole, parts = (products(step(pcr_jax.tunix.register("test", groups_at_once=k))) for k in (None, 1))
    assert whole + products(forward) == parts


def trained(policy, options, **settings):
    trainer = Trainer(policy, optax.sgd(0.1), TrainingConfig(eval_every_n_steps=100, **settings), dict)
    loss = function_registry.get_policy_loss_fn(options.policy_loss_fn)
    trainer.with_loss_fn(lambda model, train_example: loss(model, train_example, options, 0, 30), has_aux=True)
    trainer.with_gen_model_input_fn(lambda x: {"train_example": x})
    trainer.with_rl_metrics_to_log({"kl": np.mean})
    logged = []
    kept = trainer._post_process_train_step
    trainer._post_process_train_step = lambda aux: (logged.append(aux), kept(aux))
    trainer.train([example(policy)])
    return trainer, logged


def test_a_trainer_of_tunix_takes_the_update_and_the_metrics():
    policy, options = model(), config()
    before = jax.tree.map(np.asarray, nnx.state(policy, nnx.Param))
    _, update = gradient(function_registry.get_policy_loss_fn("pcr"), model(), example(model()), options)
    trainer, logged = trained(policy, options)
    after = nnx.state(policy, nnx.Param)
    assert distance(jax.tree.map(lambda x, u: x - 0.1 * u, before, update), after) < 1e-6
    assert set(pcr_jax.tunix.METRICS) < set(trainer.rl_metrics_to_log)
    assert logged[0]["pcr/conflict_rate"] > 0


def test_microbatches_that_tunix_averages_are_refused():
    with pytest.raises(ValueError, match="another estimator"):
        trained(model(), config(), gradient_accumulation_steps=2)


def test_of_a_model_with_lora_the_adapters_are_resolved():
    lora = qwix.LoraProvider(module_path=".*mlp.*", rank=2, alpha=1.0)
    inputs = {"input_tokens": jnp.ones((1, 4), jnp.int32), "positions": jnp.arange(4)[None], "cache": None}
    policy = qwix.apply_lora_to_model(model(), lora, **inputs, attention_mask=jnp.ones((1, 4, 4), bool))
    assert is_lora_enabled(policy)
    batch, options = example(policy), config()

    def step(loss):
        grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True)
        return jax.tree.map(np.asarray, nnx.jit(lambda m: grads(m, batch, options, 0, 30))(policy))

    (_, _), stock = step(algo_core.grpo_loss_fn)
    (_, _), update = step(pcr_jax.tunix.register("test", rule=pcr_core.GRPO()))
    assert distance(stock, update) < 1e-6
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(update)) > 1e-3
