"""Layers that are tied, patched, pruned or used twice: each is right, by the loop where probes would be wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from cases import RULE, Small, assert_batch_right
from problems import batch, tiny_model
from torch import Tensor, nn
from torch.nn.utils import prune

from pcr_torch import PCR


def test_tied_embeddings_in_a_block_take_the_loop() -> None:
    model, data = tiny_model("qwen2"), batch()
    blocks = r"embed_tokens|up_proj"
    with pytest.raises(ValueError, match=r"norms='fast' measures plain .*embed_tokens\.weight: it is tied"):
        PCR(model, noise_every=1, blocks=blocks, norms="fast")
    assert PCR(model, noise_every=1, blocks="mlp").norms == "fast"
    method = PCR(model, blocks=blocks, rule=RULE)
    assert method.norms == "mixed"
    assert [name for name, way in method.path.items() if way != "fast"] == ["model.embed_tokens.weight"]
    assert_batch_right(method, data)


def test_tied_linear_layers_take_the_loop() -> None:
    """Each layer alone would overwrite what the other measured."""
    model = Small()
    model.layers[1].weight = model.layers[0].weight
    method = PCR(model, blocks=r"layers.*weight", rule=RULE)
    assert method.norms == "loop"
    assert_batch_right(method, batch())


def twice(module: nn.Module) -> None:
    """A forward of the object's own, as accelerate's hooks set it."""
    add_hook_to_module(module, Twice())


class Twice(ModelHook):  # type: ignore[misc]
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


def tripled(module: nn.Module) -> None:
    module.forward = lambda x: 3 * nn.functional.linear(x, module.weight, module.bias)  # type: ignore[assignment, arg-type]


def anchored(module: nn.Module) -> None:
    """A parameter that its forward does not use, of the weight's shape."""
    module.anchor = nn.Parameter(module.weight.detach().clone())  # type: ignore[operator, union-attr]


def pruned(module: nn.Module) -> None:
    prune.random_unstructured(module, "weight", 0.5)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("change", [twice, tripled, anchored, pruned])
def test_a_layer_that_only_looks_plain_takes_the_loop(change: Callable[[nn.Module], None]) -> None:
    model, data = Small(), batch()
    change(model.layers[1])
    before = data.logp(model).detach()
    method = PCR(model, blocks="layers", rule=RULE)
    assert {name: way[:4] for name, way in method.path.items() if "layers.0" in name} == {
        "layers.0.weight": "fast", "layers.0.bias": "fast"
    }  # fmt: skip
    assert all(way.startswith("loop: ") for name, way in method.path.items() if name == "layers.1.weight") or (
        change is anchored
    )
    assert method.norms == "mixed"
    with pytest.raises(ValueError, match=r"norms='fast' measures plain linear layers only; layers\.1\."):
        PCR(model, noise_every=1, blocks="layers", norms="fast")
    assert_batch_right(method, data)
    method.remove()
    torch.testing.assert_close(data.logp(model).detach(), before, rtol=0.0, atol=0.0)


def test_a_forward_that_was_put_back_is_plain() -> None:
    model = Small()
    twice(model.layers[0])
    remove_hook_from_module(model.layers[0])
    assert "forward" in model.layers[0].__dict__
    method = PCR(model, blocks=r"layers.*weight", norms="fast", rule=RULE)
    assert_batch_right(method, batch())


@pytest.mark.parametrize("change", [twice, tripled])
def test_a_forward_of_its_own_outside_the_blocks_is_kept(change: Callable[[nn.Module], None]) -> None:
    model, data = Small(), batch()
    change(model.head)
    before = data.logp(model).detach()
    method = PCR(model, blocks=r"layers.*weight", norms="fast", rule=RULE)
    assert_batch_right(method, data)
    method.remove()
    assert "forward" not in model.layers[0].__dict__
    torch.testing.assert_close(data.logp(model).detach(), before, rtol=0.0, atol=0.0)


def test_a_forward_put_around_a_probe_outlives_it() -> None:
    model, data = Small(), batch()
    method = PCR(model, blocks=r"layers.*weight", norms="fast", rule=RULE)
    twice(model.head)
    changed = data.logp(model).detach()
    method.remove()
    torch.testing.assert_close(data.logp(model).detach(), changed, rtol=0.0, atol=0.0)
