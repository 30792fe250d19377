"""`resolve` on pytrees against the core's dense method, and what it promises about memory, accuracy and errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import pcr_core
from pcr_core import BlockStatistics, Scatter
from pcr_jax import Blocks, resolve, select_blocks
from pcr_jax.products import three, three_of_rows

RULES = [
    pcr_core.PCR(alpha="variance"),
    pcr_core.PCR(alpha="snr", gate="probability", conflict="debiased"),
    pcr_core.PCR(alpha="variance", prior=pcr_core.ShrinkagePrior(), update="literal"),
    pcr_core.PCGrad(),
    pcr_core.MGDA(),
]
SHAPES = {"layers": [{"mlp": (5, 4)}, {"mlp": (3,)}], "other": (2, 3)}


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def problem(dtype: Any) -> tuple[Any, Any, Any, Any, Blocks, Any, Any]:
    """Totals as trees, the blocks' per-response contributions (n, d), and their scatter."""
    rng = np.random.default_rng(0)
    ids = np.asarray([0, 0, 0, 1, 1])
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    p = jax.tree.map(
        lambda shape: rng.standard_normal((5, *shape)) + rng.standard_normal(shape), SHAPES, is_leaf=is_shape
    )
    s = jax.tree.map(lambda x: rng.standard_normal(x.shape) - 0.3 * x, p)
    totals = [jax.tree.map(lambda x: jnp.asarray(x.sum(0), dtype), tree) for tree in (p, s)]
    blocks = select_blocks(totals[0], r"/mlp")
    dense = [
        np.concatenate([jax.tree.leaves(tree)[k].reshape(5, -1) for k in blocks.leaves], axis=1) for tree in (p, s)
    ]
    stats = pcr_core.contribution_statistics(*dense, group_ids=ids, sizes=blocks.sizes)
    noise = Scatter(*(jnp.asarray(x) for x in (stats.plasticity_var, stats.stability_var, stats.covariance)))
    return totals[0], totals[1], dense, ids, blocks, noise, stats


def flat(update: Any, blocks: Blocks) -> Any:
    return np.concatenate([np.asarray(jax.tree.leaves(update)[k]).reshape(-1) for k in blocks.leaves])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_the_dense_method(rule: Any, x64: None) -> None:
    p, s, contributions, ids, blocks, noise, _ = problem("float64")
    expected = pcr_core.resolve(*contributions, group_ids=ids, rule=rule, sizes=blocks.sizes)
    for form in (resolve, jax.jit(resolve, static_argnames=("rule", "blocks"))):
        update, report = form(p, s, noise, rule, blocks=blocks)
        np.testing.assert_allclose(flat(update, blocks), expected.update, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(report.weights.alpha, expected.weights.alpha, rtol=1e-10)
        assert report.statistics.dot.dtype == jnp.float64
        assert report.blocks == blocks
        np.testing.assert_array_equal(update["other"], p["other"] + s["other"])


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_gradients(rule: Any, dtype: str) -> None:
    p, s, contributions, ids, blocks, noise, _ = problem(dtype)
    expected = pcr_core.resolve(*contributions, group_ids=ids, rule=rule, sizes=blocks.sizes)
    compiled = jax.jit(resolve, static_argnames=("rule", "blocks"))
    bound = 1e-5 if dtype == "float32" else 0.03
    eager, report = resolve(p, s, noise, rule, blocks=blocks)
    jitted, _ = compiled(p, s, noise, rule, blocks=blocks)
    assert {x.dtype.name for x in jax.tree.leaves(eager)} == {dtype}
    assert report.weights.alpha.dtype == jnp.float32
    assert tiny.relative(flat(eager, blocks), expected.update) <= bound
    assert tiny.relative(flat(jitted, blocks), flat(eager, blocks)) <= bound


def test_x64_keeps_float32_leaves_narrow(x64: None) -> None:
    p, s, _, _, blocks, noise, _ = problem("float32")
    update, report = resolve(p, s, noise, blocks=blocks)
    assert {x.dtype.name for x in jax.tree.leaves(update)} == {"float32"}
    assert report.weights.alpha.dtype == jnp.float64


def test_complete_statistics_are_taken_as_they_are() -> None:
    p, s, _, _, blocks, noise, stats = problem("float32")
    full = BlockStatistics(*(jnp.asarray(getattr(stats, name)) for name in BlockStatistics.__dataclass_fields__))
    one, other = resolve(p, s, full, blocks=blocks)[0], resolve(p, s, noise, blocks=blocks)[0]
    assert tiny.relative(flat(one, blocks), flat(other, blocks)) < 1e-6


def test_no_conflict_is_the_plain_sum_bit_for_bit() -> None:
    p, _, _, _, blocks, noise, _ = problem("float32")
    s = jax.tree.map(lambda x: 0.1 * x, p)
    update, report = resolve(p, s, noise, blocks=blocks)
    assert not report.weights.conflict.any()
    jax.tree.map(np.testing.assert_array_equal, update, jax.tree.map(jnp.add, p, s))


def test_takes_the_memory_of_a_donated_gradient() -> None:
    p, s, _, _, blocks, noise, _ = problem("float32")
    step = jax.jit(resolve, static_argnames=("rule", "blocks"), donate_argnums=(0,))
    update, _ = step(p, s, noise, pcr_core.PCR(alpha="variance"), blocks=blocks)
    assert all(x.is_deleted() for x in jax.tree.leaves(p))
    assert not any(x.is_deleted() for x in jax.tree.leaves((update, s)))


def test_a_block_that_is_not_finite_stays_alone_and_is_seen() -> None:
    p, s, _, _, blocks, noise, _ = problem("float32")
    p["layers"][0]["mlp"] = p["layers"][0]["mlp"].at[2, 1].set(jnp.inf)
    update, report = resolve(p, s, noise, blocks=blocks)
    assert report.weights.finite.tolist() == [False, True]
    assert not np.isfinite(update["layers"][0]["mlp"]).any()
    assert np.isfinite(update["layers"][1]["mlp"]).all()


def inner(a: Any, b: Any) -> Any:
    return three_of_rows(a, b, leading=0)[2]


@pytest.mark.parametrize("form", [inner, jax.jit(lambda a, b: inner(2 * a, b) / 2)], ids=["alone", "fused"])
@pytest.mark.parametrize("shape", [(10_000_019,), (3163, 3163)])
def test_long_inner_products_keep_float32_accuracy(form: Any, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    a = rng.random(shape, dtype="float32")
    exact = float(np.sum(a.astype("float64") ** 2))
    assert abs(float(form(jnp.asarray(a), jnp.asarray(a))) / exact - 1) <= 1e-6
    b = (rng.random(shape, dtype="float32") - 0.5).astype("float32")
    exact, size = (float(np.sum(f(a.astype("float64") * b))) for f in (np.asarray, np.abs))
    assert abs(float(form(jnp.asarray(a), jnp.asarray(b))) - exact) <= 1e-6 * size


@pytest.mark.parametrize("whole", [True, False], ids=["lanes", "parts"])
@pytest.mark.parametrize("shape", [(5_000_011,), (1025, 1024), (1025, 1023), (4, 3, 16385)])
def test_three_products_keep_float32_accuracy(shape: tuple[int, ...], whole: bool) -> None:
    rng = np.random.default_rng(0)
    p, s = (rng.random(shape, dtype="float32") - np.float32(shift) for shift in (0.0, 0.5))
    wide = [x.astype("float64") for x in (p, s)]
    pairs = [wide[0] * wide[0], wide[1] * wide[1], wide[0] * wide[1]]
    found = jax.jit(three, static_argnames="whole")(jnp.asarray(p), jnp.asarray(s), whole=whole)
    for got, terms in zip(found, pairs, strict=True):
        assert abs(float(got) - terms.sum()) <= 1e-6 * np.abs(terms).sum()


def test_equal_terms_keep_float32_accuracy() -> None:
    """They round alike in all lanes, so that nothing cancels: 2e-5 of 5e7 terms in one run a lane."""
    p, s = (np.full(20_000_011, x, dtype="float32") for x in (0.1, 0.3))
    found = jax.jit(three, static_argnames="whole")(jnp.asarray(p), jnp.asarray(s), whole=True)
    for got, (a, b) in zip(found, [(p, p), (s, s), (p, s)], strict=True):
        assert float(got) == pytest.approx(p.size * float(a[0]) * float(b[0]), rel=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (127,), (128,), (129,), (3, 257), (2, 3, 5), (0,), (1000, 4)])
def test_inner_products_of_every_shape(shape: tuple[int, ...]) -> None:
    a = np.random.default_rng(0).standard_normal(shape).astype("float32")
    assert float(inner(jnp.asarray(a), jnp.asarray(a))) == pytest.approx(float((a.astype("float64") ** 2).sum()), 1e-6)


def test_records_of_the_core_are_pytrees() -> None:
    noise = problem("float32")[5]
    doubled = jax.jit(lambda x: jax.tree.map(lambda y: 2 * y, x))(noise)
    assert isinstance(doubled, Scatter)
    np.testing.assert_array_equal(doubled.covariance, 2 * noise.covariance)


def test_bad_input_is_named() -> None:
    p, s, _, _, blocks, noise, _ = problem("float32")
    short = Scatter(*(jnp.ones(1) for _ in range(3)))
    integers = {**p, "other": jnp.ones((2, 3), jnp.int32)}
    cases: list[tuple[type[Exception], str, Any]] = [
        (ValueError, r"statistics: expected arrays of shape \(2,\)", lambda: resolve(p, s, short, blocks=blocks)),
        (TypeError, "statistics: expected a pcr_core.Scatter", lambda: resolve(p, s, p, blocks=blocks)),
        (TypeError, "rule: expected", lambda: resolve(p, s, noise, "pcr", blocks=blocks)),
        (TypeError, "plasticity_grads: other is int32", lambda: resolve(integers, s, noise, blocks=blocks)),
        (ValueError, "stability_grads: .* only one of them has", lambda: resolve(p, s["layers"], noise, blocks=blocks)),
        (
            ValueError,
            r"stability_grads: other has shape \(2,\)",
            lambda: resolve(p, {**s, "other": jnp.ones(2)}, noise, blocks=blocks),
        ),
        (
            TypeError,
            "stability_grads: other is float64, and JAX would make it float32",
            lambda: resolve(p, {**s, "other": np.ones((2, 3))}, noise, blocks=blocks),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    with pytest.raises(ValueError, match="stability_grads: other has shape"):  # while tracing too
        jax.jit(resolve, static_argnames="blocks")(p, {**s, "other": jnp.ones(2)}, noise, blocks=blocks)


@pytest.mark.parametrize("rule", [pcr_core.GRPO(), pcr_core.PCR()], ids=str)
def test_an_update_that_its_dtype_cannot_hold_is_flagged(rule: Any) -> None:
    p = {"a": jnp.full(3, 6e4, jnp.float16), "b": jnp.full(3, 3e4, jnp.float16), "c": jnp.full(2, 3e38, jnp.float32)}
    noise = Scatter(*(jnp.ones(3),) * 3)
    sums = BlockStatistics(*(jnp.full(3, 1e9),) * 3, *(jnp.ones(3),) * 4)
    for statistics in (noise, sums):  # the third block's own squares overflow, unless they are given
        update, report = jax.jit(lambda p, s=statistics: resolve(p, p, s, rule, blocks="all"))(p)
        written = [bool(np.isfinite(x).all()) for x in jax.tree.leaves(update)]
        assert written == [False, True, False]
        assert report.weights.finite.tolist()[:2] == written[:2]
    assert not jax.jit(lambda p: resolve(p, p, noise, rule, blocks="all"))(p)[1].weights.finite[2]


def test_where_one_stream_is_absent_the_shortest_combination_is_not_taken() -> None:
    p, zero = {"w": jnp.asarray([3.0, 4.0])}, {"w": jnp.zeros(2)}
    noise = Scatter(*(jnp.ones(1),) * 3)
    for pair in ((p, zero), (zero, p)):
        update, report = jax.jit(lambda pair: resolve(*pair, noise, pcr_core.MGDA(), blocks="all"))(pair)
        assert update["w"].tolist() == [3, 4]
        assert report.weights.removed.tolist() == [0]
