"""A tiny transformer in pure JAX, its parameters and a GRPO batch, all made in NumPy, that the tests here share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pcr_core
from pcr_core import Objective

GROUP = 3
PROMPT = 3
BETA = 0.1


def parameters(
    width: int = 8, hidden: int = 12, layers: int = 1, vocabulary: int = 31, seed: int = 0, dtype: str = "float32"
) -> Any:
    """Larger than the usual initialisation, so that gradients are not all alike."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 1.5 / shape[0] ** 0.5).astype(dtype)

    def layer() -> Any:
        return {
            "attn": {"qkv": matrix(width, 3 * width), "out": matrix(width, width)},
            "mlp": {"up": matrix(width, hidden), "down": matrix(hidden, width)},
        }

    return {
        "embed": rng.standard_normal((vocabulary, width)).astype(dtype),
        "layers": [layer() for _ in range(layers)],
        "head": matrix(width, vocabulary),
    }


def on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def rollouts(groups: int = 2, length: int = 5, vocabulary: int = 31, seed: int = 1, dtype: str = "float32") -> Any:
    """Off-policy and away from the reference, so that clip, ratio and KL all matter; responses of unequal length."""
    rng = np.random.default_rng(seed)
    n = groups * GROUP
    prompts = np.repeat(rng.integers(vocabulary, size=(groups, PROMPT)), GROUP, axis=0)
    mask = np.ones((n, length), dtype=bool)
    mask[0, length - 2 :] = mask[2, length - 1 :] = False
    return {
        "tokens": np.concatenate([prompts, rng.integers(vocabulary, size=(n, length))], axis=1).astype("int32"),
        "logp_old": (-3 + 0.5 * rng.standard_normal((n, length))).astype(dtype),
        "logp_ref": (-3 + 0.5 * rng.standard_normal((n, length))).astype(dtype),
        "advantages": rng.standard_normal(n).astype(dtype),
        "mask": mask,
    }


def forward(params: Any, batch: Any, product: Callable[..., Any] = jnp.matmul) -> Any:
    """(n, T) log-probabilities of the response tokens."""
    h = params["embed"][batch["tokens"]]
    for weights in params["layers"]:
        h = layer(h, weights, product)
    return logp(h, params["head"], batch["tokens"])


def layer(h: Any, weights: Any, product: Callable[..., Any] = jnp.matmul) -> Any:
    h = h + attention(h, weights["attn"])
    return h + product(jnp.tanh(product(norm(h), weights["mlp"]["up"])), weights["mlp"]["down"])


def attention(h: Any, weights: Any) -> Any:
    causal = np.tril(np.ones((h.shape[1],) * 2, dtype=bool))
    q, k, v = jnp.split(norm(h) @ weights["qkv"], 3, axis=-1)
    scores = jnp.where(causal, q @ jnp.swapaxes(k, -1, -2) / h.shape[-1] ** 0.5, -1e9)
    return jax.nn.softmax(scores) @ v @ weights["out"]


def logp(h: Any, head: Any, tokens: Any) -> Any:
    every = jax.nn.log_softmax(norm(h) @ head)[:, PROMPT - 1 : -1]
    return jnp.take_along_axis(every, tokens[:, PROMPT:, None], axis=-1)[..., 0]


def norm(h: Any) -> Any:
    return h / jnp.sqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)


def objective(total: float) -> Callable[[Any, Any], Objective[Any]]:
    """Of some rows, normalised by the token count of all."""

    def of_rows(logp: Any, rows: Any) -> Objective[Any]:
        return pcr_core.grpo_objective(
            logp,
            rows["logp_old"],
            rows["logp_ref"],
            rows["advantages"],
            rows["mask"],
            beta=BETA,
            normalization="dapo",
            normalizer=total,
        )

    return of_rows


def tokens_in(batch: Any) -> float:
    return float(np.sum(batch["mask"]))


def contributions(params: Any, batch: Any, leaves: Any, *, compiled: bool = True) -> tuple[Any, Any]:
    """The definition: (n, d) gradient of each response's two losses by `jax.grad`, one at a time."""
    of_rows, total = objective(tokens_in(batch)), len(batch["advantages"])

    def rows_of(name: str) -> Any:
        def loss(p: Any, row: Any) -> Any:
            return getattr(of_rows(forward(p, row), row), name).sum()

        gradient = jax.jit(jax.grad(loss)) if compiled else jax.grad(loss)
        grads = (
            jax.tree.leaves(gradient(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch))) for i in range(total)
        )
        return jnp.stack([jnp.concatenate([row[k].reshape(-1) for k in leaves]) for row in grads])

    return rows_of("plasticity_loss"), rows_of("stability_loss")


def relative(got: Any, expected: Any) -> float:
    got, expected = np.asarray(got, dtype="float64"), np.asarray(expected, dtype="float64")
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(got - expected)) / (size or 1.0)


def assert_statistics_close(got: Any, expected: Any, tolerance: float) -> None:
    """Relative to the sizes that the sums are made of, since inner products may cancel."""
    as_numpy = {
        name: tuple(np.asarray(getattr(x, name), dtype="float64") for x in (got, expected))
        for name in pcr_core.BlockStatistics.__dataclass_fields__
    }
    mean = np.sqrt(as_numpy["plasticity_sq"][1] * as_numpy["stability_sq"][1])
    noise = np.sqrt(as_numpy["plasticity_var"][1] * as_numpy["stability_var"][1])
    for name, (one, other) in as_numpy.items():
        scale = {"dot": mean, "covariance": noise}.get(name, np.abs(other))
        assert (np.abs(one - other) <= tolerance * scale).all(), (name, np.abs(one - other) / scale)
