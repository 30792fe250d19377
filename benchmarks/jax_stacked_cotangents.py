"""Does a jitted vmap of a pullback over two stacked cotangents give the numbers of two pullbacks?

An earlier measurement on a CPU said no at realistic layer sizes, while the same without jit was right. So pcr_jax takes
two pullbacks. This compares, on the machine it runs on, one dense layer of 512 x 1536 and a gated MLP, 16 responses of
128 tokens, with products in float64 by NumPy (the layer) and with two separate pullbacks (the MLP), compiled and not.

    python benchmarks/jax_stacked_cotangents.py
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

LIMIT = 1e-4  # float32 sums over 2048 tokens err by some 1e-6


def stacked(f: Callable[..., Any], params: Any, x: Any, pair: Any) -> Any:
    _, pull = jax.vjp(lambda p: f(p, x), params)
    return jax.vmap(lambda w: pull(w)[0])(pair)


def separate(f: Callable[..., Any], params: Any, x: Any, pair: Any) -> Any:
    _, pull = jax.vjp(lambda p: f(p, x), params)
    return jax.tree.map(lambda *streams: jnp.stack(streams), *(pull(w)[0] for w in pair))


def layer(params: Any, x: Any) -> Any:
    return x @ params["w"]


def response_norms(f: Callable[..., Any], params: Any, x: Any, pair: Any) -> Any:
    """Both vmaps at once: |gradient|^2 of every response, over the two cotangents."""

    def of_response(row: Any, weights: Any) -> Any:
        gradients = stacked(f, params, row[None], weights[:, None])
        return sum(jnp.sum(g * g, axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(gradients))

    return jax.vmap(of_response, in_axes=(0, 1))(x, pair)


def response_norms_one_by_one(f: Callable[..., Any], params: Any, x: Any, pair: Any) -> Any:
    rows = []
    for i in range(x.shape[0]):
        gradients = jax.tree.leaves(separate(f, params, x[i : i + 1], pair[:, i : i + 1]))
        rows.append(sum(jnp.sum(g * g, axis=tuple(range(1, g.ndim))) for g in gradients))
    return jnp.stack(rows)


def mlp(params: Any, x: Any) -> Any:
    return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def error(got: Any, expected: Any) -> float:
    """Largest relative error of a leaf and stream."""
    worst = 0.0
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        for a, b in zip(np.asarray(one, dtype="float64"), np.asarray(other, dtype="float64"), strict=True):
            worst = max(worst, float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return worst


def main(arguments: Sequence[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args(arguments)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    x = normal(args.responses, args.tokens, args.width)
    weight = {"w": normal(args.width, args.hidden) / args.width**0.5}
    wide = normal(2, args.responses, args.tokens, args.hidden)
    gated = {name: normal(args.width, args.hidden) / args.width**0.5 for name in ("gate", "up")}
    gated["down"] = normal(args.hidden, args.width) / args.hidden**0.5
    narrow = normal(2, args.responses, args.tokens, args.width)

    exact = {"w": np.einsum("nti,snto->sio", *(np.asarray(a, dtype="float64") for a in (x, wide)), optimize=True)}
    print(f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, {jax.devices()[0].platform}, {platform.machine()}")
    print(f"{args.responses} x {args.tokens} tokens, {args.width} x {args.hidden}; largest relative error")
    right = True
    cases: list[tuple[str, Callable[..., Any], Callable[..., Any], Any, Any, Any]] = [
        ("layer, stacked", stacked, layer, weight, wide, exact),
        ("layer, two pullbacks", separate, layer, weight, wide, exact),
        ("MLP, stacked", stacked, mlp, gated, narrow, separate(mlp, gated, x, narrow)),
        ("MLP, two pullbacks", separate, mlp, gated, narrow, separate(mlp, gated, x, narrow)),
        ("MLP, norms stacked", response_norms, mlp, gated, narrow, response_norms_one_by_one(mlp, gated, x, narrow)),
    ]
    for name, way, f, params, pair, expected in cases:
        eager = error(way(f, params, x, pair), expected)
        compiled = error(jax.jit(way, static_argnums=0)(f, params, x, pair), expected)
        right = right and eager <= LIMIT and compiled <= LIMIT
        print(f"{name:22s} eager {eager:.1e}  jit {compiled:.1e}")
    print("all right" if right else f"wrong: above {LIMIT}")
    return right


if __name__ == "__main__":
    raise SystemExit(not main())
