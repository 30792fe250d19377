"""The ways of `grpo_step.py --framework jax`: a Qwen2-like model in pure JAX, each way one compiled program.

All ways scan over the same micro-batches of whole groups, share the model's code and the objective's, and end with the
gradient of every parameter that an optimizer would be given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.progress import track

import pcr_core
from measure import Row, rows_of
from pcr_jax import pullback, resolve, select_blocks

GROUP, HEAD = 4, 64


@dataclass(frozen=True)
class Size:
    layers: int = 8
    hidden: int = 512
    mlp: int = 1536

    @property
    def heads(self) -> int:
        return self.hidden // HEAD

    @property
    def kv_heads(self) -> int:
        return self.heads // 2


def parameters(vocabulary: int, size: Size, *, stacked: bool = False) -> Any:
    rng = np.random.default_rng(0)
    hidden, mlp = size.hidden, size.mlp

    def matrix(*shape: int) -> Array:
        return jnp.asarray(0.02 * rng.standard_normal(shape), jnp.float32)

    def layer() -> Any:
        return {
            "norm": jnp.ones(hidden),
            "attn": {
                "q": matrix(hidden, size.heads * HEAD),
                "kv": matrix(hidden, 2 * size.kv_heads * HEAD),
                "o": matrix(size.heads * HEAD, hidden),
            },
            "mlp_norm": jnp.ones(hidden),
            "mlp": {"gate": matrix(hidden, mlp), "up": matrix(hidden, mlp), "down": matrix(mlp, hidden)},
        }

    layers: Any = [layer() for _ in range(size.layers)]
    if stacked:
        layers = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return {"embed": matrix(vocabulary, hidden), "layers": layers, "head": matrix(hidden, vocabulary)}


def batch(responses: int, tokens: int, vocabulary: int) -> Any:
    rng = np.random.default_rng(1)
    return {
        "tokens": jnp.asarray(rng.integers(vocabulary, size=(responses, tokens + 1)), jnp.int32),
        "advantages": jnp.asarray(rng.standard_normal(responses), jnp.float32),
        "old": jnp.asarray(0.1 * rng.standard_normal((responses, tokens)), jnp.float32),
        "reference": jnp.asarray(0.1 * rng.standard_normal((responses, tokens)), jnp.float32),
    }


def logp_fn(params: Any, rows: Any) -> Array:
    tokens = rows["tokens"]
    h = params["embed"][tokens]
    turn = _rotary(tokens.shape[1], HEAD)
    if isinstance(params["layers"], list):
        for layer in params["layers"]:
            h = _layer(h, layer, turn)
    else:
        h, _ = jax.lax.scan(lambda h, layer: (_layer(h, layer, turn), None), h, params["layers"])
    logits = _norm(h, jnp.ones(h.shape[-1])) @ params["head"]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    return chosen[..., 0]


def _layer(h: Array, layer: Any, turn: tuple[Array, Array]) -> Array:
    h = h + _attention(_norm(h, layer["norm"]), layer["attn"], turn)
    x, mlp = _norm(h, layer["mlp_norm"]), layer["mlp"]
    return h + (jax.nn.silu(x @ mlp["gate"]) * (x @ mlp["up"])) @ mlp["down"]


def _norm(h: Array, weight: Array) -> Array:
    return weight * h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)


def _rotary(length: int, width: int) -> tuple[Array, Array]:
    angle = np.arange(length)[:, None] * 10000.0 ** -(np.arange(0, width, 2) / width)
    angle = np.concatenate([angle, angle], axis=1)[None, :, None]
    return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


def _turned(x: Array, turn: tuple[Array, Array]) -> Array:
    one, other = jnp.split(x, 2, axis=-1)
    return x * turn[0] + jnp.concatenate([-other, one], axis=-1) * turn[1]


def _attention(x: Array, weights: Any, turn: tuple[Array, Array]) -> Array:
    n, length, _ = x.shape
    q = _turned((x @ weights["q"]).reshape(n, length, -1, HEAD), turn)
    k, v = jnp.split((x @ weights["kv"]).reshape(n, length, -1, HEAD), 2, axis=2)
    mixed = jax.nn.dot_product_attention(q, _turned(k, turn), v, is_causal=True)
    return mixed.reshape(n, length, -1) @ weights["o"]


def cotangents(logp: Array, rows: Any) -> tuple[Array, Array]:
    objective = pcr_core.grpo_objective(
        logp,
        logp + rows["old"],
        logp + rows["reference"],
        rows["advantages"],
        jnp.ones(logp.shape, bool),
        beta=0.05,
    )
    return objective.plasticity_cotangent, objective.stability_cotangent


@dataclass(frozen=True)
class Compiled:
    call: Callable[[], Any]
    memory: int
    seconds: float  # of processor time to trace and compile


def programs(
    size: Size, responses: int, tokens: int, vocabulary: int, groups_at_once: int, *, stacked: bool = False
) -> dict[str, Callable[[], Compiled]]:
    """Every way by the name it has in the table; calling it compiles it."""
    params, data = parameters(vocabulary, size, stacked=stacked), batch(responses, tokens, vocabulary)
    passes = responses // (GROUP * groups_at_once)

    def scanned(pull_one: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def run(params: Any, data: Any) -> Any:
            parts = jax.tree.map(lambda x: x.reshape(passes, -1, *x.shape[1:]), data)
            zeros = jax.tree.map(jnp.zeros_like, params)
            return jax.lax.scan(
                lambda sums, rows: (jax.tree.map(jnp.add, sums, pull_one(params, rows)), None), zeros, parts
            )[0]

        return run

    def vanilla(params: Any, rows: Any) -> Any:
        logp, pull = jax.vjp(lambda p: logp_fn(p, rows), params)
        plasticity, stability = cotangents(logp, rows)
        return pull(plasticity + stability)[0]

    def two(params: Any, rows: Any) -> Any:
        logp, pull = jax.vjp(lambda p: logp_fn(p, rows), params)
        plasticity, stability = (pull(w)[0] for w in cotangents(logp, rows))
        # the barrier keeps the compiler from adding the cotangents before the products
        return jax.tree.map(jnp.add, *jax.lax.optimization_barrier((plasticity, stability)))

    def pcr(blocks: str, norms: str, *, noise: bool = True) -> Callable[[Any, Any], Any]:
        chosen = select_blocks(params, blocks)
        rule = pcr_core.PCR(alpha="variance") if noise else pcr_core.PCR()

        def run(params: Any, data: Any) -> Any:
            pulled = pullback(
                logp_fn,
                params,
                data,
                cotangents,
                blocks=chosen,
                group_size=GROUP,
                norms=norms,  # type: ignore[arg-type]
                groups_at_once=groups_at_once,
                noise=noise,
            )
            scatter = pulled.scatter() if noise else None
            return resolve(pulled.plasticity, pulled.stability, scatter, rule, blocks=chosen)

        return run

    every = {
        "vanilla: one pullback": scanned(vanilla),
        "two pullbacks, no norms": scanned(two),
        "PCR without noise, all MLP kernels": pcr("mlp", "fast", noise=False),
        "PCR, all MLP kernels": pcr("mlp", "fast"),
    }
    if not stacked:
        upper = rf"layers/({'|'.join(str(i) for i in range(size.layers // 2, size.layers))})/mlp/"
        every |= {
            "PCR without noise, MLP kernels of the upper half": pcr(upper, "fast", noise=False),
            "PCR, MLP kernels of the upper half": pcr(upper, "fast"),
        }
    every["PCR, loop over responses"] = pcr("mlp", "loop")
    return {name: partial(_compiled, run, params, data) for name, run in every.items()}


def _compiled(run: Callable[[Any, Any], Any], params: Any, data: Any) -> Compiled:
    start = time.process_time()
    program = jax.jit(run).lower(params, data).compile()
    seconds = time.process_time() - start
    memory = program.memory_analysis().temp_size_in_bytes
    return Compiled(lambda: jax.block_until_ready(program(params, data)), memory, seconds)


def compare(programs: dict[str, Callable[[], Compiled]], repeats: int) -> list[Row]:
    """Each program once a round, in turns, by processor time: JAX has one core, which others may use as well."""
    every: dict[str, Compiled] = {}
    for name, compiled in track(list(programs.items()), "compiling, and warming up", transient=True):
        every[name] = compiled()
        every[name].call()
    seconds: dict[str, list[float]] = {name: [] for name in every}
    for _ in track(range(repeats), "timing", transient=True):
        for name, way in every.items():
            start = time.process_time()
            way.call()
            seconds[name].append(time.process_time() - start)
    return rows_of(seconds, {name: way.memory for name, way in every.items()})


def compile_times(programs: dict[str, Callable[[], Compiled]], repeats: int) -> list[Row]:
    """Processor time to trace and compile each program, anew in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    memory = {}
    for _ in track(range(repeats), "compiling", transient=True):
        for name, compiled in programs.items():
            jax.clear_caches()
            once = compiled()
            seconds[name].append(once.seconds)
            memory[name] = once.memory
    return rows_of(seconds, memory)
