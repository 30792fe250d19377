"""Which way an accelerator takes is told, dispatches no more for larger batches, and never waits for the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_problems import DEVICE, problem
from problems import batch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import pcr_core
from pcr_torch import PCR, kernels
from pcr_torch.kernels import (
    Layout,
    choice,
    chosen,
    plain,
    weight_products,
)


class Dispatched(TorchDispatchMode):
    """Names of operators that reach a device, and which of them wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> list[str]:
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "item")
        return [name for name in self.names if any(each in name for each in waiting)]


@pytest.mark.parametrize("by_gram", [False, True], ids=["explicit", "token Grams"])
@pytest.mark.parametrize("rows", ["even, strata in order", "even", "mixed"])
def test_as_many_operators_whatever_the_batch_and_none_that_waits(by_gram: bool, rows: str) -> None:
    """A host that waits in every layer is slower than the device."""
    counts = set()
    for n, groups, length in ((4, 2, 3), (24, 2, 5), (24, 8, 3)):
        strata = [list(range(q, n, groups)) for q in range(groups)]
        if rows == "even, strata in order":
            strata = np.arange(n).reshape(groups, -1).tolist()
        x, dy, dz = (torch.randn(n * length, k).to(DEVICE) for k in (33, 40, 40))
        owners = np.random.default_rng(0).permutation(np.repeat(np.arange(n), length))
        with Dispatched() as dispatched:
            mixed = rows == "mixed"
            layout = Layout.owned(owners, n, strata, DEVICE) if mixed else Layout.even(n, length, strata, DEVICE)
            plain.weight_products(x, [dy, dz], layout, transposed=False, by_gram=by_gram)
        assert not dispatched.waits
        counts.add(len(dispatched.names))
    assert len(counts) == 1
    assert counts.pop() <= 110


def test_layers_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro-batch waits as often whatever the number of layers."""
    monkeypatch.setattr(kernels, "serve", lambda _: True)
    waits = []
    for layers in (2, 5):
        config = LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        data = batch()
        method = PCR(model := LlamaForCausalLM(config), norms="fast", rule=pcr_core.PCR(alpha="snr"))
        logp = data.logp(model)
        objective = data.objective(logp)
        with Dispatched() as dispatched:
            method.accumulate(logp, objective, group_ids=data.group_ids)
        waits.append(dispatched.waits)
    assert waits[0] == waits[1]


def test_what_is_chosen_is_told_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    choice._log_once.cache_clear()
    x, dys = problem([0, 1], 3, 4, 1)
    with caplog.at_level("INFO", logger="pcr_torch"):
        for _ in range(2):
            weight_products(x, dys, Layout.even(2, 1, [[0, 1]], DEVICE), transposed=False)
    assert len(caplog.messages) == 1
    assert chosen(x.device) in caplog.text
    assert chosen(torch.device("cpu")) == "plain torch (Triton kernels are for CUDA, not cpu)"
    assert "plain torch" in chosen(torch.device("xpu"))


def test_a_cuda_device_without_triton_has_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    choice._why_not.cache_clear()
    monkeypatch.setattr(choice, "find_spec", lambda _: None)
    assert chosen(torch.device("cuda", 7)) == "plain torch (triton is not installed)"
    choice._why_not.cache_clear()


def test_strata_that_miss_a_response_are_refused() -> None:
    with pytest.raises(ValueError, match="strata must hold each of 0 to 2 once"):
        Layout.even(3, 4, [[0, 1]], DEVICE)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (make kernels)")
def test_kernels_compile_for_gpus_and_keep_their_accumulators_in_registers() -> None:
    """The interpreter takes what a GPU's compiler may not. Spilled accumulators would be slow, in silence."""
    script = Path(__file__).with_name("triton_compiled.py")
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr[-2000:]
    spilled = json.loads(ran.stdout.splitlines()[-1])
    few = ("bf16 sm_90", "fp16 sm_90", "products", "combine")
    assert all(count == 0 for name, count in spilled.items() if name.startswith(few)), spilled
    assert all(count < 1024 for count in spilled.values()), spilled
