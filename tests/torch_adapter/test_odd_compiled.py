"""Compiled models: right with and without the noise, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import BOTH, RULE, Small, assert_batch_right, assert_right
from problems import batch
from torch import Tensor, nn

import pcr_core
from pcr_torch import PCR


class Layer(nn.Module):
    """More than the linear layer, so that something is left to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.inner(torch.cos(x)))


def whole(model: Small, backend: str) -> Any:
    return torch.compile(model, backend=backend)


def in_place(model: Small, backend: str) -> Any:
    model.compile(backend=backend)
    return model


def part(model: Small, backend: str) -> Any:
    model.layers[1] = torch.compile(model.layers[1], backend=backend)  # type: ignore[assignment]
    return model


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@BOTH
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("how", "first"), [(whole, "compile"), (whole, "PCR"), (in_place, "PCR"), (part, "compile")])
def test_compiled_models(norms: Any, backend: str, how: Callable[..., Any], first: str) -> None:
    model, data = Small(Layer(), Layer()), batch()
    if first == "compile":
        compiled = how(model, backend)
        method = PCR(compiled, blocks=r"layers.*weight", norms=norms, rule=RULE)
    else:
        method = PCR(model, blocks=r"layers.*weight", norms=norms, rule=RULE)
        compiled = how(model, backend)
    for _ in range(2):  # the second time from the compiler's cache
        logp = data.logp(compiled)
        assert_right(method, logp, data.objective(logp), data.group_ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


@pytest.mark.usefixtures("_fresh_compiler")
def test_fullgraph_says_what_to_do() -> None:
    model, data = Small(), batch()
    method = PCR(model, noise_every=1, blocks=r"layers.*weight", norms="fast")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="for fullgraph=True use norms='loop'"):
        data.logp(compiled)  # type: ignore[arg-type]
    method.remove()
    torch._dynamo.reset()
    assert_batch_right(PCR(compiled, blocks=r"layers.*weight", norms="loop", rule=RULE), data)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", [whole, in_place])
def test_fullgraph_without_noise(how: Callable[..., Any], backend: str) -> None:
    """Nothing is put into the model, and blocks have the names of the model itself."""
    model, data = Small(Layer(), Layer()), batch()
    compiled = torch.compile(model, backend=backend, fullgraph=True) if how is whole else model
    if how is in_place:
        model.compile(backend=backend, fullgraph=True)
    updates = []
    for each in (compiled, Small(Layer(), Layer())):
        method = PCR(each, blocks=r"layers.*weight", rule=pcr_core.PCR(alpha=0.7), noise_every=0)  # type: ignore[arg-type]
        assert all(block.name.startswith("layers.") for block in method.blocks)
        for _ in range(2):
            logp = data.logp(each)  # type: ignore[arg-type]
            method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
        assert method.resolve().path == "autograd"
        updates.append([p.grad for p in method.model.parameters()])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for got, expected in zip(*updates, strict=True):
        torch.testing.assert_close(got, expected)
