"""The README's examples run, on stand-ins where they need a model of the reader's."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pcr_core

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def block(word: str) -> str:
    (found,) = [text for text in BLOCKS if word in text]
    return found


def test_arrays() -> None:
    scope: dict[str, Any] = {}
    exec(block("pcr.resolve("), scope)
    assert scope["res"].update.shape == (1000,)
    assert scope["res"].statistics.size[0] == 1000


def test_own_adapter() -> None:
    one = np.ones(3)
    stats = pcr_core.BlockStatistics(one, one, -one, one, one, 0 * one, 10 * one)
    scope: dict[str, Any] = {"pcr": pcr_core, "stats": stats}
    exec(block("pcr.PCR()(stats)"), scope)
    assert scope["weights"].stability.tolist() == [1.5, 1.5, 1.5]


def test_own_loop() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])})
    inputs = torch.randn(4, 3, 4)

    def token_log_probabilities(model: Any, x: Any) -> Any:
        for layer in model["layers"]:
            x = torch.tanh(layer(x))
        return x.log_softmax(-1)[..., 0]

    before = token_log_probabilities(model, inputs).detach()

    def part(rows: slice) -> Any:
        return SimpleNamespace(
            inputs=inputs[rows],
            logp_old=before[rows],
            logp_ref=before[rows] - 0.1,
            advantages=torch.tensor([1.0, -1.0, 0.5, -0.5])[rows],
            mask=torch.ones(4, 3, dtype=torch.bool)[rows],
            group_ids=torch.tensor([0, 0, 1, 1])[rows],
        )

    gradients = []
    for batch in ([part(slice(0, 4))], [part(slice(0, 2)), part(slice(2, 4))]):
        scope: dict[str, Any] = {
            "model": model,
            "batches": [batch, batch],
            "token_log_probabilities": token_log_probabilities,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),
        }
        exec(block("method.accumulate"), scope)
        scope["method"].remove()
        assert len(scope["report"].blocks) == 2
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)  # micro-batches add up to the batch, and steps do not add up


def test_trl_example_names_things_that_exist() -> None:
    pytest.importorskip("trl")
    import pcr_torch.trl

    text = block("PCRTrainer(")
    for name in ("PCRConfig", "PCRTrainer"):
        assert name in text
        assert hasattr(pcr_torch.trl, name)
    options = re.search(r"PCRConfig\((.*?)\)", text)
    assert options is not None
    arguments = eval(f"dict({options.group(1)})") | {"report_to": "none", "bf16": False, "use_cpu": True}
    pcr_torch.trl.PCRConfig(**arguments)
