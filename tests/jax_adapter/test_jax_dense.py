"""What the fast path measures in models of three styles, and what it refuses because it would measure it wrongly."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from tiny import relative

from pcr_jax import dense, pullback, select_blocks


def batch() -> Any:
    x = jax.random.normal(jax.random.key(0), (6, 5, 4))
    return {"x": x, "a": jnp.asarray([1.0, -1.0, 0.5, 2.0, 0.0, -1.0])}


def cotangents(logp: Any, rows: Any) -> Any:
    return rows["a"][:, None] * jnp.exp(logp), 0.1 * logp


def both(logp_fn: Any, params: Any, blocks: str) -> None:
    """The fast path against the loop, eager and compiled."""
    chosen = select_blocks(params, blocks)

    def run(params: Any, batch: Any, norms: Any) -> Any:
        return pullback(logp_fn, params, batch, cotangents, blocks=chosen, group_size=3, norms=norms)

    loop = run(params, batch(), "loop")
    for form in (run, jax.jit(run, static_argnums=2)):
        for x, y in zip(jax.tree.leaves(form(params, batch(), "fast")), jax.tree.leaves(loop), strict=True):
            assert relative(x, y) <= 1e-5


class NnxLinear(nnx.Linear):
    def __call__(self, x: Any) -> Any:
        return dense(x, self.kernel.get_value()) + self.bias.get_value()


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([NnxLinear(4, 4, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return jax.nn.log_softmax(self.head(x))[..., 0]


def test_nnx() -> None:
    structure, params = nnx.split(NnxModel(nnx.Rngs(0)))
    both(lambda params, rows: nnx.merge(structure, params)(rows["x"]), params, "mlp|layers.*kernel")


class LinenDense(linen.Module):
    features: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return dense(x, self.param("kernel", linen.initializers.lecun_normal(), (x.shape[-1], self.features)))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(2):
            x = jnp.tanh(LinenDense(4)(x))
        return jax.nn.log_softmax(linen.Dense(3)(x))[..., 0]


def test_linen() -> None:
    model = LinenModel()
    params = model.init(jax.random.key(1), batch()["x"])
    both(lambda params, rows: model.apply(params, rows["x"]), params, "LinenDense")


def test_lower_precision_inside() -> None:
    params = {"w": jax.random.normal(jax.random.key(1), (4, 4))}
    chosen = select_blocks(params, "all")

    def logp_fn(params: Any, rows: Any) -> Any:
        return jax.nn.log_softmax(dense(rows["x"], params["w"], dtype=jnp.bfloat16).astype("float32"))[..., 0]

    fast, loop = (
        pullback(logp_fn, params, batch(), cotangents, blocks=chosen, group_size=3, norms=norms)  # type: ignore[arg-type]
        for norms in ("fast", "loop")
    )
    assert relative(fast.plasticity["w"], loop.plasticity["w"]) <= 0.02
    assert relative(fast.response, loop.response) <= 0.02


def test_outside_a_pullback_it_is_a_product() -> None:
    x, w = batch()["x"], jax.random.normal(jax.random.key(1), (4, 3))
    assert relative(dense(x, w), x @ w) == 0
    got, expected = (jax.grad(lambda w, f=f: (f(x, w) ** 2).sum())(w) for f in (dense, jnp.matmul))
    assert relative(got, expected) <= 1e-6
    with pytest.raises(ValueError, match=r"kernel: expected shape \(4, out\), got \(3, 4\)"):
        dense(x, w.T)


def test_what_both_pullbacks_need_is_made_late() -> None:
    """Temporary memory as XLA plans it: 2.12 pullbacks; 4.1 with tiles stacked early, 2.2 with shared terms."""
    kernel = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    params = {"layers": [{"up": kernel, "down": jax.ShapeDtypeStruct(kernel.shape[::-1], kernel.dtype)}] * 4}
    rows = {"x": jax.ShapeDtypeStruct((6, 64, 512), jnp.float32), "a": jax.ShapeDtypeStruct((6,), jnp.float32)}
    chosen = select_blocks(params, "all")

    def logp_fn(params: Any, rows: Any) -> Any:
        h = rows["x"]
        for layer in params["layers"]:
            up = dense(h, layer["up"])
            h = h + dense(up / (1 + jnp.abs(up).sum(axis=-1, keepdims=True)), layer["down"])
        return h.sum(axis=-1)

    def one(params: Any, rows: Any) -> Any:
        logp, pull = jax.vjp(lambda p: logp_fn(p, rows), params)
        return pull(sum(cotangents(logp, rows)))

    def fast(params: Any, rows: Any) -> Any:
        return pullback(logp_fn, params, rows, cotangents, blocks=chosen, group_size=3, norms="fast", groups_at_once=2)

    most, least = (jax.jit(f).lower(params, rows).compile().memory_analysis().temp_size_in_bytes for f in (fast, one))
    assert most <= 2.16 * least


def twice(p: Any, x: Any) -> Any:
    return dense(jnp.tanh(dense(x, p["w"])), p["w"])


def tied(p: Any, x: Any) -> Any:
    return dense(x, p["w"]) @ p["w"].T


def vmapped(p: Any, x: Any) -> Any:
    return jax.vmap(lambda row: dense(row, p["w"]))(x)


def vmapped_over_as_many_tokens_as_rows(p: Any, x: Any) -> Any:
    return jax.vmap(lambda row: dense(row, p["w"]))(x[:, :3])


def flattened(p: Any, x: Any) -> Any:
    return dense(x.reshape(-1, 4), p["w"]).reshape(x.shape)


def scanned(p: Any, x: Any) -> Any:
    return jax.lax.scan(lambda h, _: (jnp.tanh(dense(h, p["w"])), None), x, None, length=3)[0]


def recurrent(p: Any, x: Any) -> Any:
    def cell(h: Any, token: Any) -> Any:
        h = jnp.tanh(dense(h, p["w"]) + token)
        return h, h

    return jnp.swapaxes(jax.lax.scan(cell, jnp.zeros(x[:, 0].shape), jnp.swapaxes(x, 0, 1))[1], 0, 1)


def branched(p: Any, x: Any) -> Any:
    return jax.lax.cond(True, lambda h: 2 * h @ p["w"], lambda h: dense(h, p["w"]), x)


def jitted(p: Any, x: Any) -> Any:
    return jax.jit(lambda h: dense(h, p["w"]) + jnp.tanh(h @ p["w"]))(x)


def rematerialised(p: Any, x: Any) -> Any:
    return jax.checkpoint(lambda h: dense(h, p["w"]) + jnp.tanh(h @ p["w"]))(x)


def traced_once_run_twice(p: Any, x: Any) -> Any:
    layer = jax.jit(lambda h: jnp.tanh(dense(h, p["w"])))
    return jax.jit(lambda h: layer(layer(h)))(x)


CASES = [
    *((model, "inside scan, jit, remat or cond") for model in (scanned, branched, jitted, rematerialised)),
    (recurrent, "inside scan, jit, remat or cond"),
    (traced_once_run_twice, "inside scan, jit, remat or cond"),
    (lambda p, x: dense(x, p["w"].astype("bfloat16")), "did not reach pcr_jax.dense as it is"),
    (lambda p, x: dense(x, 2 * p["w"]), "did not reach"),
    (lambda p, x: jax.checkpoint(lambda w: dense(x, w))(p["w"]), "did not reach"),
    (lambda p, x: jax.jit(lambda w: dense(x, w))(p["w"]), "did not reach"),
    (lambda p, x: x @ p["w"], "did not reach"),
    (twice, "passes through dense 2 times"),
    (tied, "used outside dense as well"),
    (vmapped, "no leading axis of responses"),
    (vmapped_over_as_many_tokens_as_rows, "no leading axis of responses"),
    (flattened, "no leading axis of responses"),
]


@pytest.mark.parametrize(("model", "reason"), CASES)
def test_refused_where_it_would_be_wrong_and_right_in_the_loop(model: Any, reason: str) -> None:
    params = {"w": jax.random.normal(jax.random.key(1), (4, 4))}
    chosen = select_blocks(params, "all")

    def logp_fn(params: Any, rows: Any) -> Any:
        return jax.nn.log_softmax(model(params, rows["x"]).astype("float32"))[..., 0]

    def run(norms: Any) -> Any:
        return pullback(logp_fn, params, batch(), cotangents, blocks=chosen, group_size=3, norms=norms)

    with pytest.raises(ValueError, match=f"norms='fast': w .*{reason}|norms='fast': .*for w .*{reason}"):
        run("fast")
    auto = run("auto").plasticity["w"]
    logp, pull = jax.vjp(lambda p: logp_fn(p, batch()), params)
    assert relative(auto, pull(cotangents(logp, batch())[0])[0]["w"]) <= 0.02


@pytest.mark.parametrize("model", [scanned, recurrent, jitted, traced_once_run_twice])
def test_a_kernel_outside_the_blocks_is_left_to_jax_there(model: Any) -> None:
    params = {name: jax.random.normal(jax.random.key(k), (4, 4)) for k, name in enumerate(("block", "w"))}

    def logp_fn(params: Any, rows: Any) -> Any:
        return jax.nn.log_softmax(model(params, jnp.tanh(dense(rows["x"], params["block"]))))[..., 0]

    chosen = select_blocks(params, "block")
    got = pullback(logp_fn, params, batch(), cotangents, blocks=chosen, group_size=3, norms="fast")
    logp, pull = jax.vjp(lambda p: logp_fn(p, batch()), params)
    w_p, w_s = cotangents(logp, batch())
    assert relative(got.plasticity["w"] + got.stability["w"], pull(w_p + w_s)[0]["w"]) <= 1e-5


def test_complex_numbers_cross_the_first_block_kernel() -> None:
    params = {name: jax.random.normal(jax.random.key(k), (4, 4)) for k, name in enumerate(("embed", "one", "two"))}

    def logp_fn(params: Any, rows: Any) -> Any:
        z = jnp.fft.fft(rows["x"] @ params["embed"], axis=-1)
        out = dense(jnp.tanh(z.real), params["one"]) + jnp.tanh(dense(z.imag, params["two"]))
        return jax.nn.log_softmax(out)[..., 0]

    both(logp_fn, params, "one|two")
    chosen = select_blocks(params, "one|two")
    got = pullback(logp_fn, params, batch(), cotangents, blocks=chosen, group_size=3, norms="fast")
    logp, pull = jax.vjp(lambda p: logp_fn(p, batch()), params)
    assert relative(got.plasticity["embed"] + got.stability["embed"],
                    pull(sum(cotangents(logp, batch())))[0]["embed"]) <= 1e-5  # fmt: skip
