"""Where one backward pass serves both streams, each is what its own pass would have given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import batch, tiny_model
from programs import program
from test_pullback import assert_fast_equals_loop, assert_statistics_close, assert_sum_equals_backward, resolved
from torch import Tensor, nn

from pcr_torch import PCR
from pcr_torch.graph.rows import row_shares
from pcr_torch.graph.segments import segments


@pytest.mark.parametrize(
    ("step", "end"),
    [
        *((step, "sum") for step in ("of tokens", "first token", "rolled", "so far", "permuted")),
        *((step, "gather") for step in ("attention", "misnamed", "like a leaf", "gated")),
        *(("tanh", end) for end in ("later", "every other", "flat", "masked", "open slice")),
    ],
)
def test_one_pass_or_two_the_streams_are_those_of_the_loop(step: str, end: str) -> None:
    torch.manual_seed(0)
    model = program((4, 3, 3), [("linear", True), ("linear", True), (step, False)], end)
    cotangents = torch.randn(2, *model().shape, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([0, 0, 1, 1])
    assert_fast_equals_loop(model, model, cotangents, ids, blocks=r"layers\.[01]\.weight", tolerances=(1e-4, 1e-4))


def test_layers_within_a_function_that_gives_a_number() -> None:
    """The loop cannot go through it; the sum of the streams is known without."""
    model = program((4, 3, 3), [("linear", True), ("linear", True), ("a number from a function", False)], "sum")
    cotangents = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([0, 0, 1, 1])
    assert_sum_equals_backward(model, model, cotangents, ids, blocks=r"layers\.[01]\.weight")


def test_a_hook_on_the_log_probabilities_keeps_streams_apart() -> None:
    found = {}
    for norms in ("loop", "fast"):
        model, data = tiny_model("llama"), batch()
        method = PCR(model, noise_every=1, norms=norms)  # type: ignore[arg-type]
        logp = data.logp(model)
        logp.register_hook(lambda gradient: gradient - gradient.mean(dim=1, keepdim=True))
        method.accumulate_cotangents(logp, *cotangents_of("ordinary"), group_ids=data.group_ids)
        found[norms] = method.resolve().statistics
        method.remove()
    assert_statistics_close(found["fast"], found["loop"], 1e-5)


def test_float16_takes_two_passes() -> None:
    model: Any = tiny_model("llama")
    leaves = {id(p) for name, p in model.named_parameters() if "mlp" in name}
    with torch.autocast("cpu", torch.float16):
        chain = segments(batch().logp(model), leaves)
    assert chain is not None
    assert id(model.lm_head.weight) not in chain[0].leaves
    data, (p, noise) = batch(), cotangents_of("ordinary")
    cotangents = 0.01 * p, -0.01 * p * (1 + 1e-4 * noise)
    exact = statistics_of(tiny_model("llama", dtype=torch.float64), data, cotangents, "loop")
    with torch.autocast("cpu", torch.float16):
        found = statistics_of(tiny_model("llama"), data, cotangents, "fast")
    assert_statistics_close(found, exact, 1e-2)  # one pass of the sum would lose what nearly cancels


def test_shares_of_a_sum() -> None:
    p, s = torch.tensor([[1.0, 0.0, -2.0]]), torch.tensor([[3.0, 0.0, 1.0]])
    shares = row_shares((p, s))
    assert shares is not None
    torch.testing.assert_close(shares, torch.tensor([[0.25, 0.0, 2.0, 0.0], [0.75, 0.0, -1.0, 0.0]]))
    assert row_shares((p, -p)) is None  # nothing would come down
    assert row_shares((p,)) is None
    broken = row_shares((p, torch.tensor([[float("nan"), float("inf"), 0.0]])))
    assert broken is not None
    assert not broken[:, :2].isfinite().all(dim=0).any()


def cotangents_of(kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    p, s = torch.randn(2, 6, 5, generator=generator)
    if kind == "cancelling":
        s[2, 1:3] = -p[2, 1:3]
    elif kind == "nearly":
        s = -p * (1 + 1e-5 * torch.randn(6, 5, generator=generator))
        assert (p + s).all()
    elif kind == "far apart":
        p, s = 1e-12 * p, 1e12 * s
    elif kind == "one at a time":
        half = torch.rand(6, 5, generator=generator) > 0.5
        p, s = p * half, s * ~half
    elif kind == "no stability":
        s = torch.zeros_like(s)
    return p, s


@pytest.mark.parametrize("kind", ["ordinary", "cancelling", "nearly", "far apart", "one at a time", "no stability"])
def test_streams_keep_their_digits_whatever_the_other_is(kind: str) -> None:
    data, model = batch(), tiny_model("llama", dtype=torch.float64)
    exact = statistics_of(model, data, cotangents_of(kind), "loop")
    fast = statistics_of(tiny_model("llama"), data, cotangents_of(kind), "fast")
    assert_statistics_close(fast, exact, 1e-5)


def statistics_of(model: nn.Module, data: Any, cotangents: tuple[Tensor, Tensor], norms: Any) -> Any:
    return resolved(model, lambda: data.logp(model), cotangents, data.group_ids, norms=norms)[0]


def test_what_is_not_finite_stays_visible() -> None:
    p, s = cotangents_of("ordinary")
    for broken in (float("nan"), float("inf")):
        p[3, 2] = broken
        model = tiny_model("llama")
        method = PCR(model, noise_every=1)
        data = batch()
        method.accumulate_cotangents(data.logp(model), p, s, group_ids=data.group_ids)
        assert not method.resolve().finite
        method.remove()
