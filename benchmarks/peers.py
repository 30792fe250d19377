"""Rows of `grpo_step.py` for libraries of per-sample gradients, where they are installed.

Neither gives what PCR needs: BackPACK's BatchL2Grad has norms of responses, without products of the streams and without
groups; Opacus has every response's gradient, and takes a forward pass for each backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from measure import Way

if TYPE_CHECKING:
    from update import Problem


def ways(problem: Callable[[], Problem]) -> dict[str, Way]:
    """Each on a problem of its own, since hooks stay in the model."""
    found: dict[str, Way] = {}
    for name, module, way in (
        ("BackPACK, norms of responses only", "backpack", _backpack),
        ("Opacus, gradients of all responses", "opacus", _opacus),
    ):
        if find_spec(module) is None:
            print(f"{name}: its row is left out, since {module} is not installed")
        else:
            found[name] = way(problem)
    return found


def _backpack(problem: Callable[[], Problem]) -> Way:
    @contextmanager
    def bound() -> Iterator[Callable[[], None]]:
        from backpack import backpack, extend
        from backpack.extensions import BatchL2Grad

        p = problem()
        for name in p.blocks:
            extend(p.model.get_submodule(name.rpartition(".")[0]))

        def job() -> None:
            p.model.zero_grad(set_to_none=True)
            logp = p.logp()
            plasticity, stability = p.cotangents(logp)
            with backpack(BatchL2Grad(), retain_graph=True):
                logp.backward(plasticity, retain_graph=True)
            with backpack(BatchL2Grad()):
                logp.backward(stability)

        yield job

    return bound


def _opacus(problem: Callable[[], Problem]) -> Way:
    @contextmanager
    def bound() -> Iterator[Callable[[], None]]:
        from opacus.grad_sample import GradSampleModule

        p = problem()
        p.model = GradSampleModule(p.model, loss_reduction="sum")

        def job() -> None:
            p.model.zero_grad(set_to_none=True)
            streams: list[list[torch.Tensor]] = []
            for stream in range(2):
                logp = p.logp()
                logp.backward(p.cotangents(logp)[stream])
                streams.append([leaf.grad_sample for leaf in p.parameters.values()])
                p.model.zero_grad(set_to_none=True)
            for (name, leaf), one, two in zip(p.parameters.items(), *streams, strict=True):
                if name in p.blocks:
                    for a, b in ((one, one), (two, two), (one, two)):
                        (a * b).flatten(1).sum(1)
                leaf.grad = one.sum(0) + two.sum(0)

        yield job
        p.model.to_standard_module()

    return bound
