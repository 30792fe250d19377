"""The simulated bandit's closed forms, against differentiation and the JAX adapter; tuning; what is measured."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pcr_core as pcr
import pcr_jax
from benchmarks.learning.bandit import (
    Instance,
    Memoryless,
    Params,
    Regime,
    draw,
    responses,
    simulate,
    start_accuracy,
    streams,
)
from benchmarks.learning.sweep import Grid, best_pair, front_height, matched_beta

REGIME = Regime(prompts=4, group=4, flips=0.2)
BETA = 0.3
IDS = np.arange(16) // 4


@pytest.fixture(scope="module")
def step():
    """A batch of a policy that has moved off its start, both streams of it, and a metric's weights."""
    rng = np.random.default_rng(0)
    contexts, weights = rng.normal(size=(32, 24)), [rng.normal(size=shape) / 6 for shape in ((24, 32), (32, 10))]
    labels = jnp.asarray(rng.integers(0, 10, 32))
    start = Params(*(jnp.asarray(w, jnp.float32) for w in weights))
    x = jnp.asarray(contexts, jnp.float32)
    instance = Instance(x, labels, x, labels, start, jax.random.key(3))
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), instance.start)
    batch = draw(REGIME, jnp.float32(REGIME.flips), instance, jnp.asarray(7))
    acted = responses(params, instance.start, batch)
    scale = jax.tree.map(lambda x: 1.5 + jnp.sin(3 * x), params)
    return params, batch, acted, scale, streams(params, batch.contexts, *acted, jnp.float32(BETA), scale)


def log_probabilities(params, rows):
    logits = jnp.tanh(rows["x"] @ params.first) @ params.second
    return jnp.take_along_axis(jax.nn.log_softmax(logits), rows["action"][:, None], axis=1)


def rows_of(batch, acted):
    actions, rewards, reference = acted
    return {
        "x": jnp.repeat(batch.contexts, 4, axis=0),
        "action": actions.reshape(-1),
        "reference": reference.reshape(-1, 1),
        "advantage": pcr.group_advantages(rewards.reshape(-1), jnp.asarray(IDS)),
    }


def cotangents(logp, rows):
    ones = jnp.ones_like(logp, dtype=bool)
    return pcr.grpo_objective(logp, logp, rows["reference"], rows["advantage"], ones, beta=BETA, normalizer=16)


def test_statistics_are_those_of_differentiated_contributions(step):
    params, batch, acted, scale, found = step
    rows = rows_of(batch, acted)
    jacobian = jax.jacrev(log_probabilities)(params, rows)
    objective = cotangents(log_probabilities(params, rows), rows)
    flat = np.concatenate([np.asarray(j, float).reshape(16, -1) for j in jacobian], axis=1)
    p, s = (np.asarray(w, float) * flat for w in (objective.plasticity_cotangent, objective.stability_cotangent))
    root = np.sqrt(np.concatenate([np.asarray(x, float).ravel() for x in scale]))
    sizes = [params.first.size, params.second.size]
    for weight, mine in ((np.ones_like(root), found.statistics), (root, found.metric)):
        exact = pcr.contribution_statistics(p * weight, s * weight, group_ids=IDS, sizes=sizes)
        for name in pcr.BlockStatistics.__dataclass_fields__:
            expected = getattr(exact, name)
            np.testing.assert_allclose(getattr(mine, name), expected, rtol=2e-4, atol=1e-6 * np.abs(expected).max())
    first = np.arange(flat.shape[1]) < sizes[0]
    for block, inside in enumerate((first, ~first)):
        q = (p[:, inside] @ s[:, inside].sum(0)).reshape(4, 4)
        np.testing.assert_allclose(found.along[block], 4 / 3 * np.sum((q - q.mean(1, keepdims=True)) ** 2), rtol=1e-3)


@pytest.mark.parametrize("rule", [pcr.PCR(alpha=0.5), pcr.PCR.paper(), pcr.PCGrad()], ids=["half", "paper", "pcgrad"])
def test_update_is_the_adapters(step, rule):
    params, batch, acted, _, found = step
    blocks = pcr_jax.select_blocks(params, "all")
    pulled = pcr_jax.pullback(
        log_probabilities, params, rows_of(batch, acted), cotangents, blocks=blocks, group_size=4, norms="loop"
    )
    expected, _ = pcr_jax.resolve(pulled.plasticity, pulled.stability, pulled.scatter(), rule, blocks=blocks)
    mine, _ = pcr_jax.resolve(found.plasticity, found.stability, found.statistics, rule, blocks=blocks)
    for name in Params._fields:
        np.testing.assert_allclose(getattr(mine, name), getattr(expected, name), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_methods_do_not_mix():
    """A method's runs are the same beside others and alone; GRPO without KL is NoAnchor; GRPO learns."""
    regime, cells = Regime(prompts=4, group=2), [(0.02, 0.0), (0.02, 0.1)]
    rules = [pcr.GRPO(), pcr.NoAnchor(), pcr.PCR(alpha=0.5)]
    together = simulate(regime, [Memoryless(rule) for rule in rules], [cells] * 3, [1, 2])
    alone = simulate(regime, [Memoryless(rules[2])], [cells], [2])
    np.testing.assert_allclose(together.target[2, :, 1:], alone.target[0], atol=1e-3)
    np.testing.assert_array_equal(together.target[1, 0], together.target[1, 1])
    np.testing.assert_allclose(together.general[0, 0], together.general[1, 0], atol=1e-4)
    assert np.all(together.target[0] > start_accuracy(regime, [1, 2])[0] + 0.2)
    assert np.all(together.general[0, 1] > together.general[0, 0])
    assert np.all(together.general[2, 1] > together.general[0, 1])


def test_tuning_finds_the_top_between_cells():
    grid = Grid((0.001, 0.01, 0.1, 1.0), (0.01, 0.1, 1.0))
    x, y = np.meshgrid(np.log10(grid.learning_rates), np.log10(grid.betas), indexing="ij")
    rate, beta = best_pair(grid, -((x + 1.3) ** 2) - (y + 0.8) ** 2)
    assert (rate, beta) == pytest.approx((10**-1.3, 10**-0.8), rel=0.01)
    assert best_pair(grid, x + y) == (1.0, 1.0)
    assert best_pair(grid, -((x + 1.3) ** 2) + y) == (pytest.approx(10**-1.3, rel=0.01), 1.0)
    assert best_pair(grid, -((x + 1.3) ** 2))[0] == pytest.approx(10**-1.3, rel=0.01)


def test_matched_beta_lies_between_cells():
    grid = Grid((1.0,), (0.01, 0.1, 1.0))
    assert matched_beta(grid, np.asarray([[0.2, 0.4, 0.8]]), 1.0, 0.6) == pytest.approx(10**-0.5, rel=0.01)
    assert matched_beta(grid, np.asarray([[0.7, 0.8, 0.9]]), 1.0, 0.6) == 0.01


def test_front_ignores_dominated_points_and_what_is_not_reached():
    target, general = np.asarray([[0.9], [0.5], [0.4]]), np.asarray([[0.5], [0.9], [0.4]])
    low, high = np.asarray([0.5]), np.asarray([0.9])
    assert front_height(target, general, low, high, 0.1)[0] == pytest.approx(0.7)
    assert front_height(target, general, low - 0.3, high - 0.4, 0.1)[0] == pytest.approx(0.9)
    assert front_height(target, general, low + 0.45, high + 0.1, 0.1)[0] == pytest.approx(0.1)
