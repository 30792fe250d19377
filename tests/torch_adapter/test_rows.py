"""Rows that are claimed are those that one log-probability alone depends on; there one pass serves both streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import ARCHITECTURES, batch, tiny_model
from test_pullback import assert_gradients_close, assert_statistics_close, pull
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import pcr_core
from pcr_torch import PCR
from pcr_torch.probe import install, layout, remove
from pcr_torch.rows import row_shares
from pcr_torch.segments import Segment, back, segments

SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


class Watch:
    """A receiver that keeps what comes to each layer and gives autograd what it would have."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = {path: module for path, module in model.named_modules() if layout(module) is not None}
        self.dys: dict[str, Tensor] = {}

    def arrived(
        self, path: str, x: Tensor | None, weight: Tensor, dy: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        self.dys[path] = self.dys.get(path, 0) + dy
        matrix = weight.to(dy.dtype)
        return dy @ (matrix.T if layout(self.layers[path]) == "in_out" else matrix), torch.zeros_like(weight), None


@contextmanager
def watched(model: nn.Module) -> Iterator[Watch]:
    watch = Watch(model)
    for path, module in watch.layers.items():
        install(module, watch, path)
    try:
        yield watch
    finally:
        for module in watch.layers.values():
            remove(module)


def assert_rows_are_apart(chain: tuple[Segment, ...], logp: Tensor, watch: Watch) -> set[str]:
    """By the definition: each log-probability alone has a gradient in its own rows and in no others.

    Returns:
        Names of the layers of which that was claimed.
    """
    claimed: set[str] = set()
    for index in range(logp.numel()):
        gradients = [functional.one_hot(torch.tensor(index), logp.numel()).view(logp.shape).to(logp.dtype)]
        for segment in chain:
            if segment.rows is None:
                break
            watch.dys.clear()
            gradients = back(segment, logp, gradients, keep=True)
            claimed |= set(segment.rows)
            for path, rows in segment.rows.items():
                assert not watch.dys[path][rows != index].any(), (path, index)
            for gradient, rows in zip(gradients, segment.below, strict=True):
                assert not gradient[rows != index].any(), index
    return claimed


# -- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_reach_down_to_the_last_attention(architecture: str, lora: bool) -> None:
    model = tiny_model(architecture, lora=lora)
    with watched(model) as watch:
        logp = batch().logp(model)
        found = assert_rows_are_apart(segments(logp), logp, watch)
    last = {path for path in watch.layers if ".1.mlp." in path}
    assert last
    assert found >= last
    assert not any(".0." in path or "attn" in path for path in found)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, head_dim=8, num_key_value_heads=1, final_logit_softcapping=3.0)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=1)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str) -> None:
    torch.manual_seed(0)
    model = OTHERS[name]()
    with watched(model) as watch:
        logp = batch().logp(model)
        found = assert_rows_are_apart(segments(logp), logp, watch)
    assert {"lm_head", "model.layers.1.mlp.down_proj"} <= found
    fast, fast_grads = pull(model, batch(), "fast")
    loop, loop_grads = pull(model, batch(), "loop")
    assert_statistics_close(fast.statistics, loop.statistics, 1e-5)
    assert_gradients_close(fast_grads, loop_grads, 1e-4)


def test_attention_beside_the_mlp_leaves_the_head_only() -> None:
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, use_parallel_residual=True))
    with watched(model) as watch:
        logp = batch().logp(model)
        assert assert_rows_are_apart(segments(logp), logp, watch) == {"lm_head"}


def test_checkpointing_and_bfloat16() -> None:
    model = tiny_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    model.train()
    with watched(model) as watch, torch.autocast("cpu", torch.bfloat16):
        logp = batch().logp(model)
        assert "model.layers.1.mlp.up_proj" in assert_rows_are_apart(segments(logp), logp, watch)


@pytest.mark.parametrize("compact", [False, True], ids=["all", "completions"])
def test_the_fused_head_of_trl(compact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_use_triton", lambda device: compact)
    model, data = tiny_model("qwen2"), batch()  # its head is its embedding
    utils.add_fused_lm_head(model, temperature=0.9)
    labels = data.tokens.clone()
    labels[:, : data.prompt] = -100
    labels[:, data.prompt :][~data.mask] = -100

    def logp_of(model: nn.Module) -> Tensor:
        out = model(input_ids=data.tokens, labels=labels, fused_lm_head=True)
        return torch.cat([out.log_probs[:, -data.mask.shape[1] :]])

    with watched(model) as watch:
        logp = logp_of(model)
        found = assert_rows_are_apart(segments(logp), logp, watch)
    assert found == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    results = {}
    for norms in ("fast", "loop"):
        model.zero_grad()
        method = PCR(model, norms=norms)  # type: ignore[arg-type]
        logp = logp_of(model)
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
        report = method.resolve()
        method.remove()
        results[norms] = report, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_statistics_close(results["fast"][0].statistics, results["loop"][0].statistics, 1e-5)
    assert_gradients_close(results["fast"][1], results["loop"][1], 1e-4)


# -- any graph -------------------------------------------------------------------------------------------------------

Step = Callable[["Program", Tensor], Tensor]


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)


APART: dict[str, Step] = {
    "tanh": lambda p, x: torch.tanh(x),
    "linear": lambda p, x: p.linear(x),
    "gated": lambda p, x: functional.silu(p.linear(x)) * p.linear(x),
    "plain linear": lambda p, x: functional.linear(x, p.matrix, p.vector),
    "made weight": lambda p, x: x * (1.0 + p.vector.exp()),
    "rms": lambda p, x: _norm(x),
    "layer norm": lambda p, x: functional.layer_norm(x, x.shape[-1:], p.vector),
    "softmax": lambda p, x: x.softmax(-1),
    "flat and back": lambda p, x: torch.tanh(x.reshape(-1, x.shape[-1])).view(x.shape) + x,
    "halves": lambda p, x: torch.cat([x[..., 1:], x[..., :1]], dim=-1),
    "of features": lambda p, x: x + x.mean(-1, keepdim=True),
    "itself": lambda p, x: x + x,
}
MIXING: dict[str, Step] = {
    "of tokens": lambda p, x: x + x.mean(1, keepdim=True),
    "of responses": lambda p, x: x + x.mean(0),
    "of all": lambda p, x: x + x.mean((0, 1)),
    "of everything": lambda p, x: x + x.mean(),
    "softmax over tokens": lambda p, x: x.softmax(1),
    "first token": lambda p, x: x + x[:, :1],
    "first tokens": lambda p, x: x * (x[:, 0] if x.shape[0] == x.shape[1] else x[:, :1]),
    "first response": lambda p, x: x * x[:1],
    "turned": lambda p, x: x + x.transpose(0, 1) if x.shape[0] == x.shape[1] else x.flip(0),
    "features turned": lambda p, x: x + x.mT if x.shape[1] == x.shape[2] else x.flip(1),
    "rolled": lambda p, x: x.roll(1, 1),
    "so far": lambda p, x: x.cumsum(1),
    "permuted": lambda p, x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "regrouped": lambda p, x: _norm(x.reshape(x.shape[0], -1)).view(x.shape),
    "attention": lambda p, x: x + (x @ x.mT).softmax(-1) @ x,
    "tokens through a layer": lambda p, x: x + p.linear(x.mT).mT if x.shape[1] == x.shape[2] else x.flip(1),
    "layer norm of all": lambda p, x: functional.layer_norm(x, x.shape[1:]),
    "two slices": lambda p, x: torch.cat([x[:, 1:], x[:, :1]], dim=1),
    "weight from activations": lambda p, x: functional.linear(x, p.matrix * x.mean((0, 1))),
    "made positions": lambda p, x: x + torch.tanh(p.linear(p.matrix)) if x.shape[1] == x.shape[2] else x.flip(1),
    "made for a response": lambda p, x: x * p.linear(p.start[:, :1]),
    "made in parts": lambda p, x: (x[..., None] * p.linear(p.start)).sum(-1) if len({*x.shape}) == 1 else x.flip(0),
    "a number from a function": lambda p, x: x + checkpoint(p.layers[-1], 2.0 * p.start, use_reentrant=True).mean(),
    "misnamed": lambda p, x: Mul.apply(x),  # type: ignore[no-untyped-call]
    "scaled by all": lambda p, x: p.start * x.mean(),
}


class Mul(torch.autograd.Function):
    """Named as an operation that it is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0].flip(1)


class Leafy(torch.autograd.Function):
    """With what tells autograd's leaves from other nodes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = x
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return 2.0 * grad_outputs[0]


EITHER: dict[str, Step] = {  # by the sizes, or with more care than is taken
    "like a leaf": lambda p, x: Leafy.apply(x),  # type: ignore[no-untyped-call]
    "misread": lambda p, x: _norm(x.reshape(x.shape[::-1])).reshape(x.shape),
    "renamed": lambda p, x: torch.tanh(x.reshape(x.shape[1], x.shape[0], -1)).reshape(x.shape),
}
ENDS: dict[str, Step] = {
    "sum": lambda p, x: x.sum(-1),
    "gather": lambda p, x: x.log_softmax(-1).gather(-1, torch.ones_like(x[..., :1], dtype=torch.int64)).squeeze(-1),
    "later": lambda p, x: x[:, 1:].sum(-1),
    "every other": lambda p, x: p.linear(x)[:, ::2].logsumexp(-1),
    "flat": lambda p, x: x.flatten(0, 1).sum(-1).view(x.shape[:2]),
    "over tokens": lambda p, x: x.sum(1),
    "over responses": lambda p, x: x.sum(0),
    "features": lambda p, x: p.linear(x)[:, 0],
    "masked": lambda p, x: torch.zeros(p.mask.shape).masked_scatter(p.mask, p.linear(x[p.mask]).sum(-1)),
    "filled": lambda p, x: x.sum(-1).masked_fill(p.mask, 0.0),
    "open slice": lambda p, x: torch.ops.aten.slice.Tensor(x, 1, None, None).sum(-1),
    "scattered onto one row": lambda p, x: x[:1, :, 0].masked_scatter(p.mask, x[p.mask].sum(-1)),
    "chosen twice": lambda p, x: x.flatten(0, 1)[torch.zeros(x[..., 0].numel(), dtype=torch.int64)].sum(-1)[None],
    "through layers": lambda p, x: p.linear(torch.tanh(p.linear(torch.tanh(x.sum(1))))),
}


class Program(nn.Module):
    """A chain of steps with skip connections, on sizes that may coincide."""

    def __init__(self, shape: tuple[int, int, int], steps: list[tuple[Step, bool]], end: Step) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        n, tokens, width = shape
        self.start = nn.Parameter(torch.randn(shape, generator=generator))
        self.matrix = nn.Parameter(torch.randn(width, width, generator=generator))
        self.vector = nn.Parameter(torch.randn(width, generator=generator))
        self.mask = torch.rand(n, tokens, generator=generator) > 0.4
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=k % 2 == 0) for k in range(32))
        self.steps, self.end = steps, end

    def linear(self, x: Tensor) -> Tensor:
        self.used += 1
        out: Tensor = self.layers[self.used](x)
        return out

    def forward(self) -> Tensor:
        self.used = -1
        x = self.start * 1.0
        for step, skip in self.steps:
            x = x + step(self, x) if skip else step(self, x)
        return self.end(self, x)


def program(shape: tuple[int, int, int], names: list[tuple[str, bool]], end: str) -> Program:
    return Program(shape, [({**APART, **MIXING, **EITHER}[name], skip) for name, skip in names], ENDS[end])


SHAPES = ((3, 3, 3), (2, 3, 4), (3, 1, 3), (1, 3, 3), (4, 2, 2))


@given(
    shape=st.sampled_from(SHAPES),
    steps=st.lists(st.tuples(st.sampled_from([*APART, *APART, *MIXING, *EITHER]), st.booleans()), max_size=7),
    end=st.sampled_from(list(ENDS)),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_the_graph_rows_that_are_claimed_are_apart(
    shape: tuple[int, int, int], steps: list[tuple[str, bool]], end: str
) -> None:
    model = program(shape, [("linear", True), *steps], end)
    with watched(model) as watch:
        logp = model()
        assert_rows_are_apart(segments(logp), logp, watch)


@pytest.mark.parametrize("mixing", MIXING)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_what_mixes_rows_is_never_claimed(shape: tuple[int, int, int], mixing: str) -> None:
    model = program(shape, [("linear", True), ("linear", True), (mixing, False), ("linear", True)], "sum")
    with watched(model) as watch:
        logp = model()
        found = assert_rows_are_apart(segments(logp), logp, watch)
    assert not found & {"layers.0", "layers.1"}  # below it


@pytest.mark.parametrize("end", ["sum", "gather", "later", "every other", "flat", "masked", "filled"])
def test_what_keeps_rows_apart_is_claimed(end: str) -> None:
    model = program((2, 3, 4), [(name, True) for name in APART], end)
    with watched(model) as watch:
        logp = model()
        found = assert_rows_are_apart(segments(logp), logp, watch)
    assert found == {f"layers.{k}" for k in range(model.used + 1)}


@pytest.mark.parametrize(
    ("step", "end"),
    [
        *((step, "sum") for step in ("of tokens", "first token", "rolled", "so far", "permuted")),
        *((step, "gather") for step in ("attention", "misnamed", "like a leaf", "gated")),
        *(("tanh", end) for end in ("later", "every other", "flat", "masked", "open slice")),
    ],
)
def test_one_pass_or_two_the_streams_are_those_of_the_loop(step: str, end: str) -> None:
    results = {}
    for norms in ("loop", "fast"):
        torch.manual_seed(0)
        model = program((4, 3, 3), [("linear", True), ("linear", True), (step, False)], end)
        method = PCR(model, blocks=r"layers\.[01]\.weight", norms=norms)  # type: ignore[arg-type]
        logp = model()
        generator = torch.Generator().manual_seed(1)
        cotangents = torch.randn(2, *logp.shape, generator=generator)
        method.accumulate_cotangents(logp, *cotangents, group_ids=torch.tensor([0, 0, 1, 1]))
        report = method.resolve()
        method.remove()
        results[norms] = report, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_statistics_close(results["fast"][0].statistics, results["loop"][0].statistics, 1e-4)
    assert_gradients_close(results["fast"][1], results["loop"][1], 1e-4)


def test_layers_within_a_function_that_gives_a_number() -> None:
    """The loop cannot go through it; the sum of the streams is known without."""
    model = program((4, 3, 3), [("linear", True), ("linear", True), ("a number from a function", False)], "sum")
    cotangents = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    model().backward(cotangents.sum(dim=0))
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    method = PCR(model, blocks=r"layers\.[01]\.weight", norms="fast", rule=pcr_core.GRPO())
    method.accumulate_cotangents(model(), *cotangents, group_ids=torch.tensor([0, 0, 1, 1]))
    method.resolve()
    method.remove()
    assert_gradients_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected, 1e-5)


def test_a_hook_on_the_log_probabilities_keeps_streams_apart() -> None:
    found = {}
    for norms in ("loop", "fast"):
        model, data = tiny_model("llama"), batch()
        method = PCR(model, norms=norms)  # type: ignore[arg-type]
        logp = data.logp(model)
        logp.register_hook(lambda gradient: gradient - gradient.mean(dim=1, keepdim=True))
        method.accumulate_cotangents(logp, *cotangents_of("ordinary"), group_ids=data.group_ids)
        found[norms] = method.resolve().statistics
        method.remove()
    assert_statistics_close(found["fast"], found["loop"], 1e-5)


def test_float16_takes_two_passes() -> None:
    model = tiny_model("llama")
    with watched(model), torch.autocast("cpu", torch.float16):
        assert segments(batch().logp(model))[-1].rows is None
        assert not any("mlp" in path for segment in segments(batch().logp(model)) for path in segment.rows or {})
    data, (p, noise) = batch(), cotangents_of("ordinary")
    cotangents = 0.01 * p, -0.01 * p * (1 + 1e-4 * noise)
    exact = statistics_of(tiny_model("llama", dtype=torch.float64), data, cotangents, "loop")
    with torch.autocast("cpu", torch.float16):
        found = statistics_of(tiny_model("llama"), data, cotangents, "fast")
    assert_statistics_close(found, exact, 1e-2)  # one pass of the sum would lose what nearly cancels


# -- shares ----------------------------------------------------------------------------------------------------------


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
    method = PCR(model, norms=norms)
    logp = data.logp(model)
    p, s = (c.to(logp.dtype) for c in cotangents)
    method.accumulate_cotangents(logp, p, s, group_ids=data.group_ids)
    report = method.resolve()
    method.remove()
    return report.statistics


def test_what_is_not_finite_stays_visible() -> None:
    p, s = cotangents_of("ordinary")
    for broken in (float("nan"), float("inf")):
        p[3, 2] = broken
        model = tiny_model("llama")
        method = PCR(model)
        data = batch()
        method.accumulate_cotangents(data.logp(model), p, s, group_ids=data.group_ids)
        assert not method.resolve().finite
        method.remove()
