"""PyTorch: pcr_core on its tensors, eager or compiled, and the in-place path of pcr_torch."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np

from pcr_conformance.adapter import Resolved
from pcr_conformance.cases import Case, ObjectiveCase
from pcr_conformance.dense import DenseAdapter, Function, objective_flat
from pcr_conformance.rounding import ANY_ORDER, Summation
from pcr_core import BlockStatistics, Rule, Weights


class TorchAdapter(DenseAdapter):
    """PyTorch; `backend` None is eager, else a backend of torch.compile(fullgraph=True)."""

    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    capabilities = frozenset({"objective", "grad"})
    summation = Summation("pairwise", 256)  # cascades: at most 4 levels of 64 for a float64 sum of 2^28 terms

    def __init__(self, backend: str | None = None, device: str = "cpu") -> None:
        import torch

        self.torch = torch
        self.device = device
        self.software = f"torch {torch.__version__}"
        if device.startswith("cuda"):
            self.summation = ANY_ORDER  # its reductions are trees of an unstated shape
            self.software += f", {torch.cuda.get_device_name(device)}"
        self.backend = backend
        self.compiled = backend is not None
        self.name = "torch" if backend is None else f"torch-compile-{backend}"
        self.plain = None if backend is None else TorchAdapter(device=device)
        if self.compiled:
            self.capabilities = self.capabilities | {"compile"}
        self._compiled: dict[Any, Any] = {}

    def from_numpy(self, x: Any, dtype: str) -> Any:
        named = {"int": self.torch.int64, "bool": self.torch.bool}
        kind = named[dtype] if dtype in named else getattr(self.torch, dtype)
        return self.torch.asarray(np.array(x)).to(device=self.device, dtype=kind)

    def to_numpy(self, x: Any) -> Any:
        x = x.detach().cpu()
        return x.numpy() if x.dtype == self.torch.bool else x.to(self.torch.float64).numpy()

    def device_of(self, x: Any) -> str:
        return str(x.device)

    def run(self, function: Function, arrays: tuple[Any, ...], *static: Any) -> tuple[Any, ...]:
        if self.backend is None:
            return function(arrays, *static)
        key = (function, static)
        if key not in self._compiled:
            # static arguments are bound outside: making a rule is not the compiled function's work
            bound = partial(_with_static, function, static)
            self._compiled[key] = self.torch.compile(bound, fullgraph=True, dynamic=False, backend=self.backend)
        # all compiled functions share one code object here, and dynamo's limit counts per code object
        with self.torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000):
            out: tuple[Any, ...] = self._compiled[key](*arrays)
        return out

    def autodiff(self, case: ObjectiveCase, dtype: str) -> tuple[Any, Any] | None:
        logp, *others = self._tokens(case, dtype)
        logp.requires_grad_(True)
        plasticity, stability, *_ = objective_flat((logp, *others), tuple(case.options().items()))
        grads = [self.torch.autograd.grad(loss.sum(), logp, retain_graph=True)[0] for loss in (plasticity, stability)]
        return self.to_numpy(grads[0]), self.to_numpy(grads[1])


def _with_static(function: Function, static: tuple[Any, ...], *arrays: Any) -> tuple[Any, ...]:
    return function(arrays, *static)


class InPlaceAdapter(TorchAdapter):
    """What PCR(model) does with a layer's two gradients: fused inner products, and a sum in the first one's memory.

    `in_place` False takes the same products and leaves both gradients as they are.
    """

    dtypes = ("float32",)
    accumulator = "float32"  # the totals are gradients, and those are float32
    summation = Summation("blocked", 1024)

    def __init__(self, in_place: bool = True, device: str = "cpu") -> None:
        super().__init__(device=device)
        self.name = "torch-in-place" if in_place else "torch-out-of-place"
        self.capabilities = frozenset({"in_place"} if in_place else {})
        self.plain = InPlaceAdapter(in_place=False, device=device) if in_place else None

    def _statistics(self, case: Case, dtype: str) -> tuple[list[tuple[Any, Any]], BlockStatistics[Any]]:
        from pcr_torch.combine import gradient_products

        p, s, *_ = self._streams(case, dtype)
        totals = []
        for block in case.blocks():
            totals.append(tuple(x[:, block].double().sum(0).to(x.dtype) for x in (p, s)))
        dense = BlockStatistics(
            *(self.torch.as_tensor(x, device=self.device) for x in vars(super().statistics(case, dtype)).values())
        )
        products = self.torch.stack([gradient_products(*pair) for pair in totals]).T
        stats = replace(dense, plasticity_sq=products[0], stability_sq=products[1], dot=products[2])
        return totals, stats

    def statistics(self, case: Case, dtype: str) -> BlockStatistics[Any]:
        stats = self._statistics(case, dtype)[1]
        return BlockStatistics(*(self.to_numpy(getattr(stats, f.name)) for f in fields(stats)))

    def resolve(self, case: Case, rule: Rule, dtype: str) -> Resolved:
        from pcr_torch.combine import add_combination, longest

        totals, stats = self._statistics(case, dtype)
        weights = rule(stats)
        bounds = longest(weights, stats).tolist()
        parts, reused, written = [], [], []
        for i, (p, s) in enumerate(totals):
            a, b = float(weights.plasticity[i]), float(weights.stability[i])
            if self.plain is None:
                parts.append(a * p + b * s)
                written.append(bool(parts[-1].isfinite().all()))
                continue
            where = p.data_ptr()
            parameter = self.torch.nn.Parameter(self.torch.zeros_like(p))
            written.append(add_combination(parameter, p, s, a, b, bounds[i]))
            parts.append(parameter.grad)
            reused.append(parameter.grad.data_ptr() == where)
        update = self.torch.cat(parts)
        weights = replace(weights, finite=weights.finite & self.torch.tensor(written, device=self.device))
        return Resolved(
            self.to_numpy(update),
            Weights(*(self.to_numpy(getattr(weights, f.name)) for f in fields(weights))),
            BlockStatistics(*(self.to_numpy(getattr(stats, f.name)) for f in fields(stats))),
            self.dtype_of(update),
            self.device_of(update),
            in_input_memory=all(reused) and bool(reused),
        )
