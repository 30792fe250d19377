"""How parameters are measured in models that are written in any way: what is tapped, and whether it is right."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny import relative

from pcr_jax import dense, fast, pullback, select_blocks


def batch() -> Any:
    x = jax.random.normal(jax.random.key(0), (6, 5, 4))
    return {"x": x, "a": jnp.asarray([1.0, -1.0, 0.5, 2.0, 0.0, -1.0])}


def cotangents(logp: Any, rows: Any) -> Any:
    return rows["a"][:, None] * jnp.exp(logp), 0.1 * logp


def measured(logp_fn: Any, params: Any, blocks: str = "all") -> Any:
    grouped = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), batch())
    return fast.measure(logp_fn, params, grouped, select_blocks(params, blocks), None)


def assert_right(logp_fn: Any, params: Any, blocks: str = "all", bound: float = 1e-5) -> None:
    """Measured in two pullbacks against the loop, compiled."""
    chosen = select_blocks(params, blocks)

    @partial(jax.jit, static_argnums=2)
    def run(params: Any, batch: Any, norms: Any) -> Any:
        return pullback(logp_fn, params, batch, cotangents, blocks=chosen, group_size=3, norms=norms)

    got, loop = run(params, batch(), "fast"), run(params, batch(), "loop")
    assert got.path == "fast"
    for name in ("plasticity", "stability", "logp", "response", "stratum"):
        x, y = (jnp.concatenate([t.ravel() for t in jax.tree.leaves(getattr(p, name))]) for p in (got, loop))
        assert relative(x, y) <= bound, name


def logp_of(model: Any) -> Any:
    """The first word's log-probability of (rows, T, words) logits."""
    return lambda params, rows: jax.nn.log_softmax(model(params, rows["x"]).astype("float32"))[..., 0]


def plain(p: Any, x: Any) -> Any:
    return x @ p["w"]


def with_the_alias(p: Any, x: Any) -> Any:
    return dense(x, p["w"])


def from_the_left(p: Any, x: Any) -> Any:
    return jnp.einsum("io,nti->nto", p["w"], x)


def transposed(p: Any, x: Any) -> Any:
    return jax.lax.dot_general(x, p["w"].T, (((2,), (1,)), ((), ())))


def by_heads(p: Any, x: Any) -> Any:
    heads = jnp.einsum("nti,ihd->nthd", x, p["w"].reshape(4, 2, 2))
    return jnp.einsum("nthd,hdo->nto", jnp.tanh(heads), jnp.arange(12.0).reshape(2, 2, 3))


def twice(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"]) @ p["w"]


def vmapped(p: Any, x: Any) -> Any:
    return jax.vmap(lambda row: row @ p["w"])(x)


def flattened(p: Any, x: Any) -> Any:
    return (x.reshape(-1, 4) @ p["w"]).reshape(x.shape)


def tokens_first(p: Any, x: Any) -> Any:
    return jnp.swapaxes(jnp.swapaxes(x, 0, 1) @ p["w"], 0, 1)


def sorted_and_put_back(p: Any, x: Any) -> Any:
    order = jnp.argsort(x[:, 0, 0])
    return jnp.zeros(x.shape).at[order].set(jnp.tanh(x[order] @ p["w"]))


def read_in_every_turn(p: Any, x: Any) -> Any:
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=3)[0]


def recurrent(p: Any, x: Any) -> Any:
    def cell(h: Any, token: Any) -> Any:
        h = jnp.tanh(h @ p["w"] + token)
        return h, h

    return jnp.swapaxes(jax.lax.scan(cell, jnp.zeros(x[:, 0].shape), jnp.swapaxes(x, 0, 1))[1], 0, 1)


def jitted(p: Any, x: Any) -> Any:
    return jax.jit(lambda w, h: h @ w + jnp.tanh(h @ w))(p["w"], x)


def jitted_over_a_closure(p: Any, x: Any) -> Any:
    layer = jax.jit(lambda h: jnp.tanh(h @ p["w"]))
    return jax.jit(lambda h: layer(layer(h)))(x)


def rematerialised(p: Any, x: Any) -> Any:
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(lambda h, w: jnp.tanh(jnp.tanh(h @ w) @ w), policy=policy)(x, p["w"])


def cast_at_the_top(p: Any, x: Any) -> Any:
    return x.astype("bfloat16") @ p["w"].astype("bfloat16")


TAPPED = [plain, with_the_alias, from_the_left, transposed, by_heads, twice, vmapped, flattened, tokens_first]
TAPPED += [sorted_and_put_back, read_in_every_turn, recurrent, jitted, jitted_over_a_closure, rematerialised]


@pytest.mark.parametrize("model", [*TAPPED, cast_at_the_top])
def test_a_kernel_is_tapped_however_it_is_multiplied(model: Any) -> None:
    params = {"w": jax.random.normal(jax.random.key(1), (4, 4))}
    how, _ = measured(logp_of(model), params)
    assert how.copied == ()
    assert how.taps
    assert_right(logp_of(model), params, bound=0.02 if model is cast_at_the_top else 1e-5)


def stacked(length: int = 3) -> Any:
    keys = jax.random.split(jax.random.key(1), 2)
    shapes = ((length, 4, 7), (length, 7, 4))
    return {"layers": {n: 0.5 * jax.random.normal(k, s) for n, k, s in zip(("up", "down"), keys, shapes, strict=True)}}


def layer(x: Any, weights: Any) -> Any:
    return x + jnp.tanh(x @ weights["up"]) @ weights["down"]


def scanned(p: Any, x: Any) -> Any:
    return jax.lax.scan(lambda h, weights: (layer(h, weights), None), x, p["layers"])[0]


def scanned_backwards_with_remat(p: Any, x: Any) -> Any:
    body = jax.checkpoint(lambda h, weights: (layer(h, weights), None))
    return jax.lax.scan(body, x, p["layers"], reverse=True, unroll=2)[0]


def scanned_along_the_second_axis(p: Any, x: Any) -> Any:
    weights = jax.tree.map(lambda w: jnp.moveaxis(jnp.swapaxes(w, 0, 1), 1, 0), p["layers"])
    return jax.lax.scan(lambda h, weights: (layer(h, weights), None), x, weights)[0]


def scanned_over_scans(p: Any, x: Any) -> Any:
    """Layers, each over all tokens one after the other."""

    def one(h: Any, weights: Any) -> Any:
        _, tokens = jax.lax.scan(lambda c, t: (c, layer(t, weights)), None, jnp.swapaxes(h, 0, 1))
        return jnp.swapaxes(tokens, 0, 1), None

    return jax.lax.scan(one, x, p["layers"])[0]


SCANNED = [scanned, scanned_backwards_with_remat, scanned_along_the_second_axis, scanned_over_scans]


@pytest.mark.parametrize("model", SCANNED)
def test_kernels_that_a_scan_slices_are_tapped(model: Any) -> None:
    how, _ = measured(logp_of(model), stacked())
    assert how.copied == ()
    assert len(how.taps) == 2
    assert_right(logp_of(model), stacked())


def experts(p: Any, x: Any) -> Any:
    """All experts see all tokens, and a router mixes them."""
    mixed = jax.nn.softmax(x @ jnp.arange(12.0).reshape(4, 3) / 12)
    return jnp.einsum("neto,nte->nto", jnp.einsum("nti,eio->neto", x, p["w"]), mixed)


def experts_with_tokens_of_their_own(p: Any, x: Any) -> Any:
    parts = jnp.stack([x, 2 * x, jnp.tanh(x)], axis=1)
    return jnp.einsum("neti,eio->neto", parts, p["w"]).sum(1)


@pytest.mark.parametrize("model", [experts, experts_with_tokens_of_their_own])
def test_experts_in_one_array_are_tapped(model: Any) -> None:
    params = {"w": jax.random.normal(jax.random.key(1), (3, 4, 5))}
    how, _ = measured(logp_of(model), params)
    assert how.copied == ()
    assert_right(logp_of(model), params)


def tied(p: Any, x: Any) -> Any:
    return x @ p["w"] @ p["w"].T


def branched(p: Any, x: Any) -> Any:
    return jax.lax.cond(jnp.asarray(True), lambda h: 2 * h @ p["w"], lambda h: h @ p["w"], x)


def scaled(p: Any, x: Any) -> Any:
    return x @ (2 * p["w"])


def embedded(p: Any, x: Any) -> Any:
    return p["w"][jnp.argmax(x, axis=-1)]


def indexed(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"][:, :2]) @ p["w"][:2]


def carried(p: Any, x: Any) -> Any:
    return jax.lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1].T), None), (x, p["w"]), None, length=2)[0][0]


def weighed(p: Any, x: Any) -> Any:
    return x * p["w"][0] + p["w"][1]


def unread(p: Any, x: Any) -> Any:
    return x


CASES = [
    (tied, "used by several products in different layouts"),
    (branched, "is read by cond"),
    (scaled, "is read by mul"),
    (embedded, "is read by gather"),
    (indexed, "is read by slice"),
    (carried, "is carried from turn to turn of a scan"),
    (unread, "reaches no matrix product"),
]


@pytest.mark.parametrize(("model", "reason"), CASES)
def test_what_cannot_be_tapped_is_copied_if_it_is_small(
    model: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"w": jax.random.normal(jax.random.key(1), (4, 4))}
    how, _ = measured(logp_of(model), params)
    assert (how.copied, how.taps) == ((0,), {})
    assert_right(logp_of(model), params)

    monkeypatch.setattr(fast, "_SMALL", 15)
    none, why = measured(logp_of(model), params)
    assert none is None
    assert reason in why
    chosen = select_blocks(params, "all")
    with pytest.raises(ValueError, match=f"norms='fast': w .*{reason}"):
        pullback(logp_of(model), params, batch(), cotangents, blocks=chosen, group_size=3, norms="fast")
    assert pullback(logp_of(model), params, batch(), cotangents, blocks=chosen, group_size=3).path == "loop"


def test_biases_and_norms_are_measured_beside_kernels() -> None:
    params = {"w": jax.random.normal(jax.random.key(1), (4, 4)), "b": jnp.ones(4), "scale": jnp.full(4, 0.5)}

    def model(p: Any, x: Any) -> Any:
        x = p["scale"] * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))
        return x @ p["w"] + p["b"]

    how, _ = measured(logp_of(model), params)
    assert how.copied == (0, 1)
    assert [tap.kernel.leaf for tap in how.taps.values()] == [2]
    assert_right(logp_of(model), params)


def test_a_model_that_cannot_be_vmapped_takes_the_loop() -> None:
    @jax.custom_batching.custom_vmap
    def strict(x: Any) -> Any:
        return x

    @strict.def_vmap
    def rule(axis_size: int, in_batched: Any, x: Any) -> Any:
        raise NotImplementedError("no batching rule for strict")

    params = {"w": jax.random.normal(jax.random.key(1), (4, 4))}
    chosen = select_blocks(params, "all")

    def logp_fn(params: Any, rows: Any) -> Any:
        kept = strict(jax.lax.stop_gradient(rows["x"]))
        return jax.nn.log_softmax(kept @ params["w"])[..., 0]

    def run(norms: Any) -> Any:
        return pullback(logp_fn, params, batch(), cotangents, blocks=chosen, group_size=3, norms=norms)

    assert run("auto").path == "loop"
    with pytest.raises(ValueError, match=r"cannot be vmapped.*no batching rule for strict"):
        run("fast")


@pytest.mark.parametrize("model", [read_in_every_turn, recurrent, jitted, jitted_over_a_closure, branched])
def test_a_kernel_outside_the_blocks_is_left_to_jax(model: Any) -> None:
    params = {name: jax.random.normal(jax.random.key(k), (4, 4)) for k, name in enumerate(("block", "w"))}

    def logp_fn(params: Any, rows: Any) -> Any:
        return jax.nn.log_softmax(model(params, jnp.tanh(rows["x"] @ params["block"])))[..., 0]

    chosen = select_blocks(params, "block")
    got = pullback(logp_fn, params, batch(), cotangents, blocks=chosen, group_size=3, norms="fast")
    _, pull = jax.vjp(lambda p: logp_fn(p, batch()), params)
    w_p, w_s = cotangents(logp_fn(params, batch()), batch())
    assert relative(got.plasticity["w"] + got.stability["w"], pull(w_p + w_s)[0]["w"]) <= 1e-5


def test_complex_numbers_cross_the_first_block_kernel() -> None:
    params = {name: jax.random.normal(jax.random.key(k), (4, 4)) for k, name in enumerate(("embed", "one", "two"))}

    def logp_fn(params: Any, rows: Any) -> Any:
        z = jnp.fft.fft(rows["x"] @ params["embed"], axis=-1)
        return jax.nn.log_softmax(z.real @ params["one"] + jnp.tanh(z.imag @ params["two"]))[..., 0]

    assert_right(logp_fn, params, "one|two")


def test_memory_does_not_grow_with_the_number_of_kernels() -> None:
    """Temporary memory as XLA plans it: 3.1 pullbacks here, and eight gradients of the largest of eight kernels."""
    kernel = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    params = {"layers": [{"up": kernel, "down": jax.ShapeDtypeStruct(kernel.shape[::-1], kernel.dtype)}] * 4}
    rows = {"x": jax.ShapeDtypeStruct((6, 64, 512), jnp.float32), "a": jax.ShapeDtypeStruct((6,), jnp.float32)}
    chosen = select_blocks(params, "all")

    def logp_fn(params: Any, rows: Any) -> Any:
        h = rows["x"]
        for layer in params["layers"]:
            up = h @ layer["up"]
            h = h + (up / (1 + jnp.abs(up).sum(axis=-1, keepdims=True))) @ layer["down"]
        return h.sum(axis=-1)

    def one(params: Any, rows: Any) -> Any:
        logp, pull = jax.vjp(lambda p: logp_fn(p, rows), params)
        return pull(sum(cotangents(logp, rows)))

    def both(params: Any, rows: Any) -> Any:
        return pullback(logp_fn, params, rows, cotangents, blocks=chosen, group_size=3, norms="fast", groups_at_once=2)

    most, least = (jax.jit(f).lower(params, rows).compile().memory_analysis().temp_size_in_bytes for f in (both, one))
    assert most - 8 * 4 * 512 * 1024 <= 3.3 * least


def test_the_alias_is_a_product() -> None:
    x, w = batch()["x"], jax.random.normal(jax.random.key(1), (4, 3))
    assert relative(dense(x, w), x @ w) == 0
    with pytest.raises(ValueError, match=r"kernel: expected shape \(4, out\), got \(3, 4\)"):
        dense(x, w.T)
