"""The simulated bandit's gradients without their sampling noise, in closed form, and those of other responses.

The policy has ten actions, so expectations over responses are sums. All gradients are those of a loss over the step's
prompts, like P and S.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.stats import binom

import pcr_core as pcr
from benchmarks.learning.bandit import ACTIONS, Params, Step


def expected_plasticity(step: Step) -> Params:
    """E P over actions and flips, given the prompts, for GRPO's advantages or any shift of them by a constant.

    With g_a = grad log pi(a) and s the probability of the right action, E A g is s (E[A | right] - E[A | wrong]) times
    g_right, since E g = 0. A depends on the number of rewards in the group, which is binomial.
    """
    group = step.actions.shape[1]
    probabilities = jnp.exp(_logits(step.params, step))
    right = jax.nn.one_hot(step.batch.labels, ACTIONS)
    solve = jnp.sum(probabilities * right, axis=1)
    rewarded = solve * (1 - step.flips) + (1 - solve) * step.flips
    others = jnp.arange(group)  # rewards among the rest of the group
    table = (jnp.arange(group)[None, :] < jnp.arange(group + 1)[:, None]).astype(jnp.float32)  # r rewards in row r
    ids = jnp.arange(table.size) // group
    advantages = pcr.group_advantages(table.reshape(-1), ids).reshape(table.shape)
    chance = binom.pmf(others[None, :], group - 1, rewarded[:, None])
    difference = chance @ advantages[1:, 0] - chance @ advantages[:-1, -1]  # of a reward, and of none
    coefficient = solve * (1 - 2 * step.flips) * difference
    return backward(step, -coefficient[:, None] * (right - probabilities) / len(solve))


def expected_stability(step: Step) -> Params:
    """E S given the prompts: beta times the gradient of KL(reference || policy), which k3's gradient estimates."""
    policy, reference = jnp.exp(_logits(step.params, step)), jnp.exp(_logits(step.start, step))
    return backward(step, step.beta * (policy - reference) / len(policy))


def sampled_stability(step: Step, actions: Array, kl: pcr.objective.KL = "k3") -> Params:
    """S of these actions, (prompts, any number of them)."""
    ratio = _taken(_logits(step.start, step) - _logits(step.params, step), actions)
    cotangent = -ratio if kl == "k3_ratio" else 1 - jnp.exp(ratio)
    return pullback(step, actions, step.beta * cotangent / actions.size)


def other_actions(step: Step) -> Array:
    """(prompts, group) drawn from the same policy on the same prompts, independently of the step's own."""
    cumulative = jnp.cumsum(jnp.exp(_logits(step.params, step)), axis=1)
    return jnp.sum(step.uniform[:, :, None] >= cumulative[:, None, :-1], axis=2)


def mean_score(step: Step, actions: Array) -> Params:
    """Z, the mean of grad log pi over these responses: what a shift of all advantages by -1 adds to -P."""
    return pullback(step, actions, jnp.full(actions.shape, 1 / actions.size))


def pullback(step: Step, actions: Array, cotangent: Array) -> Params:
    """sum_i cotangent_i grad log pi(action_i), both (prompts, any number)."""
    error = jax.nn.one_hot(actions, ACTIONS) - jnp.exp(_logits(step.params, step))[:, None, :]
    return backward(step, jnp.einsum("qg,qgk->qk", cotangent, error))


def backward(step: Step, logits: Array) -> Params:
    """The gradient that belongs to a derivative (prompts, actions) with respect to the logits."""
    hidden = jnp.tanh(step.batch.contexts @ step.params.first)
    inner = (logits @ step.params.second.T) * (1 - hidden**2)
    return Params(step.batch.contexts.T @ inner, hidden.T @ logits)


def _logits(params: Params, step: Step) -> Array:
    log_policy: Array = jax.nn.log_softmax(jnp.tanh(step.batch.contexts @ params.first) @ params.second)
    return log_policy


def _taken(values: Array, actions: Array) -> Array:
    return jnp.take_along_axis(values, actions, axis=1)
