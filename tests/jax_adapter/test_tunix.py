"""The policy loss of google-tunix against tunix's own; `make tunix` runs it in an environment of its own."""

import numpy as np
import pytest

pytest.importorskip("tunix", reason="google-tunix needs an environment of its own: make tunix")

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.rl import algo_core, common
from tunix.rl.grpo.grpo_learner import GRPOConfig

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
    made.temperature, made.kl_clamp_value = 0.9, options.get("kl_clamp_value")
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
