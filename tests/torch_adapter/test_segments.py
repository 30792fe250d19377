"""The graph is cut where it can be, both streams stay exact where it cannot, and merge below the lowest block."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from counting import Counting
from problems import batch, tiny_model
from test_pullback import (
    assert_fast_equals_loop,
    assert_gradients_close,
    assert_statistics_close,
    assert_sum_equals_backward,
    pull,
    resolved,
)
from torch import Tensor, nn

from pcr_torch import PCR
from pcr_torch.graph.segments import segments


def ids(model: nn.Module, pattern: str) -> set[int]:
    return {id(parameter) for name, parameter in model.named_parameters() if re.search(pattern, name)}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_segments_end_at_the_residual_stream(architecture: str) -> None:
    model = tiny_model(architecture)
    chain = segments(batch().logp(model), ids(model, r"mlp.*weight"))
    assert chain is not None
    ends = [segment.last.name() for segment in chain if segment.last is not None]
    assert len(ends) == len(model.get_submodule("model.layers" if architecture != "gpt2" else "transformer.h")) + 1
    assert all("Add" in name for name in ends)
    assert set().union(*(segment.leaves for segment in chain)) == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_streams_merge_below_the_lowest_block(architecture: str) -> None:
    model = tiny_model(architecture)
    blocks = r"(layers|h)\.1\.mlp.*weight"
    fast, fast_grads = pull(model, batch(), "fast", blocks=blocks)
    loop, loop_grads = pull(model, batch(), "loop", blocks=blocks)
    assert_statistics_close(fast.statistics, loop.statistics, 1e-5)
    assert_gradients_close(fast_grads, loop_grads, 1e-4)


@pytest.mark.parametrize("noise", [{"noise_every": 0}, {"noise_every": 1}], ids=["without noise", "with noise"])
@pytest.mark.parametrize(("blocks", "passes"), [(r"layers\.1\.mlp", 2), (r"layers\.0\.mlp", 3), ("mlp", 3)])
def test_two_passes_only_between_the_last_attention_and_the_lowest_block(
    blocks: str, passes: int, noise: dict[str, Any]
) -> None:
    """Two layers have two attentions; the second stream takes the upper one at most, and not the head."""
    model, data = tiny_model("llama"), batch()
    method = PCR(model, blocks=blocks, **noise)
    logp = data.logp(model)
    with Counting() as counted:
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
    method.remove()
    assert counted.of("scaled_dot_product.*backward") == passes
    assert counted.of("log_softmax_backward") == 1


@pytest.mark.parametrize("path", ["layers.0.post_attention_layernorm", "layers.1.post_attention_layernorm"])
def test_hooks_below_the_lowest_block_get_gradients(path: str) -> None:
    """Also in the pass in which nothing goes on from that block."""
    results = {}
    for norms in ("fast", "loop"):
        model = tiny_model("llama")
        weight = model.get_submodule(f"model.{path}").weight
        weight.register_hook(lambda gradient: 2 * gradient)  # type: ignore[operator]
        results[norms] = pull(model, batch(), norms)[1]
    assert_gradients_close(results["fast"], results["loop"], 1e-4)


class Skipping(nn.Module):
    """A skip connection around the layers, so that their inputs do not separate the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.embed = nn.Embedding(31, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 31)

    def forward(self, tokens: Tensor) -> Tensor:
        first = hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden) + first)
        out: Tensor = self.head(hidden)
        return out


class Ahead(Skipping):
    """Something computed before the layers and used after them, with a leaf of its own."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, late = self.embed(tokens), self.norm.weight * 2.0
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        out: Tensor = self.head(hidden * late)
        return out


class Join(torch.autograd.Function):
    """A sum that says nothing of its second term's gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0], None


class Joining(Skipping):
    """Segments that end at sums, whose terms have other shapes, or no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.ones(8) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer, scale in zip(self.layers, self.scales, strict=True):
            hidden = torch.tanh(layer(hidden)) + 0.1 * scale
            hidden = Join.apply(hidden, 2.0 * hidden)  # type: ignore[no-untyped-call]
        out: Tensor = self.head(hidden)
        return out


def logp_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("kind", [Skipping, Ahead])
def test_what_crosses_the_layers_is_seen(kind: type[Skipping]) -> None:
    torch.manual_seed(0)
    model = kind()
    logp = logp_of(model, torch.randint(31, (6, 5)))
    chain = segments(logp, ids(model, r"layers.*weight"))
    assert chain is not None
    assert sum(bool(segment.tensors) for segment in chain) == 1
    assert_streams(model)


class Sharing(Skipping):
    """One norm for all layers: its gradient has parts from several segments."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = torch.tanh(layer(self.norm(hidden)))
        out: Tensor = self.head(self.norm(hidden))
        return out


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
def test_what_several_segments_use_gets_all_its_parts(hooked: bool) -> None:
    torch.manual_seed(0)
    model = Sharing()
    if hooked:  # autograd's to run
        for parameter in model.norm.parameters():
            parameter.register_hook(lambda gradient: 2 * gradient)
    chain = segments(logp_of(model, torch.randint(31, (6, 5))), ids(model, r"layers.*weight"))
    assert (chain is None) == hooked
    if chain is not None:
        assert len(chain) == 5
        assert {id(use.leaf) for segment in chain for use in segment.crossing} == ids(model, "norm")
    assert_sum(model, r"layers\.\d.weight")


def test_segments_that_end_in_several_shapes_or_without_a_gradient() -> None:
    torch.manual_seed(0)
    model = Joining()
    chain = segments(logp_of(model, torch.randint(31, (6, 5))), ids(model, r"layers.*weight"))
    assert chain is not None
    assert len(chain) > 2
    assert_streams(model)


class SharedUp(Skipping):
    """A layer in no block that all others share: in the lowest of them alone only the streams' sum goes on from it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for down in self.layers:
            hidden = (hidden + down(torch.tanh(self.up(hidden)))).cumsum(1) / 3  # in attention's place
        out: Tensor = self.head(hidden)
        return out


def test_a_shared_layer_goes_on_with_both_streams_but_in_its_lowest_call() -> None:
    torch.manual_seed(0)
    assert_streams(SharedUp())


class Chain(Skipping):
    """A segment ends with the layer below the lowest block."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.low(torch.tanh(self.embed(tokens)))
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden)).cumsum(1)
        out: Tensor = self.head(hidden)
        return out


def test_the_lowest_block_may_lie_on_a_layer_frozen_meanwhile() -> None:
    torch.manual_seed(0)
    model = Chain()
    method = PCR(model, noise_every=1, blocks=r"layers\.\d.weight", norms="fast")
    model.low.requires_grad_(False)
    logp, cotangents, ids = problem(model)
    method.accumulate_cotangents(logp(), *cotangents, group_ids=ids)
    found = method.resolve().statistics
    method.remove()
    expected = resolved(model, logp, cotangents, ids, blocks=r"layers\.\d.weight", norms="loop")[0]
    assert_statistics_close(found, expected, 1e-5)


class Plain(Skipping):
    """A chain of layers, whose graph can be divided."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        out: Tensor = self.head(hidden)
        return out


@pytest.mark.parametrize("place", ["layers.1", "layers.2", "head"])
def test_hooks_that_change_a_modules_gradients_are_run(place: str) -> None:
    torch.manual_seed(0)
    model = Plain()
    model.get_submodule(place).register_full_backward_hook(lambda module, into, out: tuple(2 * g for g in into))
    assert_streams(model)


def problem(model: nn.Module) -> tuple[Callable[[], Tensor], Tensor, Tensor]:
    """Log-probabilities of some tokens, cotangents and groups."""
    tokens = torch.randint(31, (6, 5))
    return lambda: logp_of(model, tokens), torch.randn(2, 6, 4), torch.tensor([0, 0, 0, 1, 1, 1])


def assert_streams(model: nn.Module) -> None:
    assert_fast_equals_loop(model, *problem(model), blocks=r"layers\.\d.weight")


def assert_sum(model: nn.Module, blocks: str) -> None:
    assert_sum_equals_backward(model, *problem(model), blocks=blocks)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_an_ordinary_backward_pass_is_left_alone(architecture: str) -> None:
    model, data = tiny_model(architecture), batch()
    data.logp(model).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    method = PCR(model, noise_every=1)
    data.logp(model).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    method.remove()
    assert_gradients_close(found, expected, 1e-6)


def test_nothing_keeps_a_dropped_graph_alive() -> None:
    model = tiny_model("llama")
    method = PCR(model, noise_every=1)
    seen: list[weakref.ref[Tensor]] = []
    hook = model.model.layers[1].mlp.act_fn.register_forward_hook(
        lambda _module, _args, out: seen.append(weakref.ref(out))
    )  # type: ignore[union-attr, operator]
    logp = batch().logp(model)
    hook.remove()
    assert seen[0]() is not None
    del logp
    gc.collect()
    assert seen[0]() is None
    method.remove()


class InPlace(Skipping):
    """Layers that work in place on their input and on a probed layer's output."""

    def __init__(self) -> None:
        super().__init__()

        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(8, 8)
                self.act = nn.ReLU(inplace=True)

            def forward(self, hidden: Tensor) -> Tensor:
                hidden.mul_(1.5)
                out: Tensor = hidden + self.act(self.inner(hidden))
                return out

        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) * 1.0
        for layer in self.layers:
            hidden = layer(hidden)
        out: Tensor = self.head(hidden)
        return out


def test_layers_may_work_in_place() -> None:
    torch.manual_seed(0)
    assert_sum(InPlace(), "inner.weight")
