"""Rows that are claimed are those that one log-probability alone depends on; there one pass serves both streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import ARCHITECTURES, batch, tiny_model
from programs import APART, EITHER, ENDS, MIXING, program
from test_pullback import assert_fast_equals_loop, assert_gradients_close, assert_statistics_close, pull
from torch import Tensor, nn
from torch.nn import functional
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

from pcr_torch.graph.order import in_order
from pcr_torch.graph.rows import Rows
from pcr_torch.probe import install, is_probe, layout, remove

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
        self, node: Any, x: Tensor | None, weight: Tensor, dy: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        path: str = node.path
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
            remove(module, watch)


def assert_rows_are_apart(logp: Tensor, watch: Watch) -> set[str]:
    """By the definition: each log-probability alone has a gradient in its own rows and in no others.

    Returns:
        Names of the layers of which that was claimed.
    """
    rows, claimed = Rows(logp), dict[str, Tensor]()
    for step in in_order(logp):
        mine = None if step is None else rows.take(step.node)
        if mine is not None and is_probe(step.node):  # type: ignore[union-attr]
            claimed[cast(Any, step).node.path] = mine
    for index in range(logp.numel()):
        watch.dys.clear()
        only = functional.one_hot(torch.tensor(index), logp.numel()).view(logp.shape).to(logp.dtype)
        torch.autograd.backward(logp, only, retain_graph=True)
        for path, of in claimed.items():
            assert not watch.dys[path][of != index].any(), (path, index)
    return set(claimed)


# -- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_reach_down_to_the_last_attention(architecture: str, lora: bool) -> None:
    model = tiny_model(architecture, lora=lora)
    with watched(model) as watch:
        logp = batch().logp(model)
        found = assert_rows_are_apart(logp, watch)
    last = {path for path in watch.layers if ".1.mlp." in path}
    assert last
    assert found >= last
    into_attention = ("q_proj", "k_proj", "v_proj", "c_attn")
    assert not any(".0." in path or path.endswith(into_attention) for path in found)


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
        found = assert_rows_are_apart(logp, watch)
    assert {"lm_head", "model.layers.1.mlp.down_proj"} <= found
    fast, fast_grads = pull(model, batch(), "fast")
    loop, loop_grads = pull(model, batch(), "loop")
    assert_statistics_close(fast.statistics, loop.statistics, 1e-5)
    assert_gradients_close(fast_grads, loop_grads, 1e-4)


def test_attention_beside_the_mlp() -> None:
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, use_parallel_residual=True))
    with watched(model) as watch:
        logp = batch().logp(model)
        found = assert_rows_are_apart(logp, watch)
    last = ("attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert found == {"lm_head", *(f"gpt_neox.layers.1.{name}" for name in last)}


def test_checkpointing_and_bfloat16() -> None:
    model = tiny_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    model.train()
    with watched(model) as watch, torch.autocast("cpu", torch.bfloat16):
        logp = batch().logp(model)
        assert "model.layers.1.mlp.up_proj" in assert_rows_are_apart(logp, watch)


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
        found = assert_rows_are_apart(logp, watch)
    assert found == {f"model.layers.1.{name}_proj" for name in ("self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}
    objective = data.objective(logp)
    cotangents = objective.plasticity_cotangent, objective.stability_cotangent
    assert_fast_equals_loop(model, lambda: logp_of(model), cotangents, data.group_ids, tolerances=(1e-5, 1e-4))


# -- any graph -------------------------------------------------------------------------------------------------------

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
        assert_rows_are_apart(logp, watch)


@pytest.mark.parametrize("mixing", MIXING)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_what_mixes_rows_is_never_claimed(shape: tuple[int, int, int], mixing: str) -> None:
    model = program(shape, [("linear", True), ("linear", True), (mixing, False), ("linear", True)], "sum")
    with watched(model) as watch:
        logp = model()
        found = assert_rows_are_apart(logp, watch)
    assert not found & {"layers.0", "layers.1"}  # below it


@pytest.mark.parametrize(
    "end", ["first twice", "chosen twice", "scattered onto one row", "put on one", "spread", "added onto one"]
)
def test_ends_that_mix_rows_claim_none(end: str) -> None:
    model = program((2, 3, 4), [("linear", True)], end)
    with watched(model) as watch:
        logp = model()
        assert not assert_rows_are_apart(logp, watch)


@pytest.mark.parametrize(
    "end", ["sum", "gather", "later", "every other", "flat", "masked", "filled", "reordered", "selected", "put back"]
)
def test_what_keeps_rows_apart_is_claimed(end: str) -> None:
    model = program((2, 3, 4), [(name, True) for name in APART], end)
    with watched(model) as watch:
        logp = model()
        found = assert_rows_are_apart(logp, watch)
    assert found == {f"layers.{k}" for k in range(model.used + 1)}
