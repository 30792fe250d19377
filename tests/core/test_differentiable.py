"""The update is differentiable wherever the mathematics is, and never NaN where a stream vanishes."""

from __future__ import annotations

import numpy as np
import pytest

import pcr_core as pcr

RULES = {
    "default": pcr.PCR(alpha="variance"),
    "literal": pcr.PCR.paper(update="literal"),
    "snr": pcr.PCR(alpha="snr"),
    "probability": pcr.PCR(alpha="variance", gate="probability"),
    "shrinkage debiased": pcr.PCR(alpha="variance", prior=pcr.ShrinkagePrior(), conflict="debiased"),
    "hard": pcr.HardProjection(),
    "pcgrad": pcr.PCGrad(),
    "mgda": pcr.MGDA(),
}


def _streams(sign: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    p = 0.5 * rng.normal(size=(4, 3)) + 1
    return p, sign * p + 0.4 * rng.normal(size=(4, 3))


@pytest.mark.parametrize("sign", [-1.0, 1.0], ids=["conflict", "agreement"])
@pytest.mark.parametrize("name", RULES)
def test_torch_derivatives_are_those_of_differences(name: str, sign: float) -> None:
    torch = pytest.importorskip("torch")
    p, s = (torch.asarray(x).requires_grad_(True) for x in _streams(sign))
    ids = torch.asarray([0, 0, 1, 1])
    assert torch.autograd.gradcheck(lambda a, b: pcr.resolve(a, b, group_ids=ids, rule=RULES[name]).update, (p, s))


ZEROS = ["plasticity", "stability", "both", "identical"]


def _degenerate(kind: str) -> tuple[np.ndarray, np.ndarray]:
    p, s = _streams(-1.0)
    if kind in ("plasticity", "both"):
        p = 0 * p
    if kind in ("stability", "both"):
        s = 0 * s
    if kind == "identical":
        p, s = np.ones_like(p), -np.ones_like(s)
    return p, s


@pytest.mark.parametrize("kind", ZEROS)
@pytest.mark.parametrize("name", RULES)
def test_torch_derivatives_are_finite_at_zero(name: str, kind: str) -> None:
    torch = pytest.importorskip("torch")
    p, s = (torch.asarray(x).requires_grad_(True) for x in _degenerate(kind))
    res = pcr.resolve(p, s, group_ids=torch.asarray([0, 0, 1, 1]), rule=RULES[name])
    weights = torch.arange(1.0, 4.0, dtype=torch.float64)
    grads = torch.autograd.grad(
        (res.update * weights).sum() + res.weights.removed.sum() + res.weights.cosine.sum(), (p, s)
    )
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("name", ["default", "snr", "probability", "shrinkage debiased", "pcgrad", "mgda"])
def test_jax_derivatives(name: str) -> None:
    """Finite at zeros; elsewhere equal to torch's, under jit with traced group ids."""
    jax = pytest.importorskip("jax")
    rule = RULES[name]
    with jax.enable_x64(True):
        weights = jax.numpy.arange(1.0, 4.0)

        def loss(p, s, ids):  # type: ignore[no-untyped-def]
            return (pcr.resolve(p, s, group_ids=ids, rule=rule).update * weights).sum()

        run = jax.jit(jax.grad(loss, argnums=(0, 1)))  # one compilation for all kinds
        ids = jax.numpy.asarray([0, 0, 1, 1])
        for kind in ZEROS:
            p, s = (jax.numpy.asarray(x) for x in _degenerate(kind))
            assert all(bool(jax.numpy.isfinite(g).all()) for g in run(p, s, ids)), kind
        p, s = _streams(-1.0)
        grads = run(jax.numpy.asarray(p), jax.numpy.asarray(s), ids)
    torch = pytest.importorskip("torch")
    tp, ts = (torch.asarray(x).requires_grad_(True) for x in (p, s))
    update = pcr.resolve(tp, ts, group_ids=torch.asarray([0, 0, 1, 1]), rule=rule).update
    expected = torch.autograd.grad((update * torch.arange(1.0, 4.0, dtype=torch.float64)).sum(), (tp, ts))
    for got, want in zip(grads, expected):
        np.testing.assert_allclose(np.asarray(got), want.numpy(), rtol=1e-9, atol=1e-12)


def test_vmap_over_problems() -> None:
    jax = pytest.importorskip("jax")
    p, s = _streams(-1.0)
    ids = jax.numpy.asarray([0, 0, 1, 1])
    stacked_p, stacked_s = (jax.numpy.stack([x, -2 * x]) for x in (p, s))
    one = jax.jit(lambda a, b: pcr.resolve(a, b, group_ids=ids).update)
    got = jax.jit(jax.vmap(one))(stacked_p, stacked_s)
    for i in range(2):
        expected = one(stacked_p[i], stacked_s[i])
        np.testing.assert_allclose(got[i], expected, rtol=2e-5)
