"""Gradients of block parameters for both streams, with their per-response inner products, from two backward passes.

The passes are those of `totals.py`: one of a single stream and one of the streams' sum. In the first, the probe on a
layer (`probe.py`) keeps the layer's output gradient. In the second it has the output gradients of both streams, and
forms the weight's gradients and their per-response inner products together (`cpu.py`; `kernels` on an accelerator).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pcr_torch import cpu, kernels
from pcr_torch.distributed import kept_whole, local, reduce_scatter, sharded_modules
from pcr_torch.graph.owner_arrays import Owners, spread
from pcr_torch.graph.owners import arrangement, by_response, survey
from pcr_torch.graph.segments import segments
from pcr_torch.kernels import WORKSPACE, Layout
from pcr_torch.layers import Layers
from pcr_torch.products import Products, bias_products, in_range, input_gradient, parameter_gradients
from pcr_torch.pullback import PAIRS, Pulled, Total, add_total, total_dtype, wide_dtype
from pcr_torch.totals import Pass, larger, sum_and_single


class Recorder:
    """Installs probes on the model's linear layers, and collects what they measure on block parameters."""

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter], workspace: int = WORKSPACE) -> None:
        self._parameters = parameters
        self._workspace = workspace
        self._found: dict[str, tuple[Tensor, Tensor]] = {}  # inner products of this pull, by block parameter
        self._pass: Pass | Literal["off", "other"] = "off"
        self._single: int | None = None  # which stream has a pass of its own
        self._strata: Sequence[Sequence[int]] = ()
        self._kept: dict[str, Tensor] = {}  # gradients of layers' outputs after the first pass
        self._seen: set[tuple[str, str]] = set()
        self._sharded = any(isinstance(p, DTensor) for p in parameters.values())
        self._fsdp = sharded_modules(model) if self._sharded else []
        self.late = False  # whether no probe was in place when the last surveyed log-probabilities were computed
        self._skipped: Collection[str] = ()  # block parameters that are measured elsewhere
        self._owners: dict[str, Owners] = {}  # of the rows of each layer, where they are known
        self._layouts: dict[tuple[int, torch.Size], Layout] = {}  # on an accelerator, by the identity of owners
        self._arrangements: dict[tuple[int, torch.Size], tuple[Tensor, Tensor] | None] = {}  # the same on a CPU
        self._layers = Layers(model, parameters)
        self.uncovered = self._layers.uncovered

    def install(self) -> None:
        """Probes on every layer that holds block parameters."""
        self._layers.install(self)

    def remove(self) -> None:
        """The layers' own forward."""
        self._layers.remove(self)

    def survey(self, logp: Tensor, *, trusting: bool) -> dict[str, str]:
        """Why block parameters cannot be measured in the backward passes of `logp`, by name; those absent can.

        Args:
            logp: (n, T) with its graph.
            trusting: whether rows (n, tokens, features) that the graph does not show to be those of the responses, in
                their order, are taken to be.
        """
        found = survey(logp)
        self.late = not found.calls
        why, self._owners = self._layers.unmeasurable(found, trusting=trusting, sharded=self._sharded)
        return why

    def pull(
        self,
        logp: Tensor,
        cotangents: Sequence[Tensor],
        strata: Sequence[Sequence[int]],
        totals: Sequence[Total],
        skipped: Collection[str] = (),
    ) -> Pulled:
        """Backward passes over logp's graph (freed at the end); `survey` has been called with it.

        Streams' gradients of block parameters are added to `totals` where they arise, those of others to their .grad.
        Block parameters that are `skipped` count among the others, and their inner products are 0.
        """
        self._responses, self._found = logp.shape[0], {}
        self._strata, self._totals, self._skipped = strata, totals, frozenset(skipped)
        before = {name: _version(p.grad) for name, p in self._parameters.items() if name not in self._skipped}
        try:
            self._through(logp, cotangents)
            if self._kept:
                raise RuntimeError(f"the two backward passes saw different layers: {sorted(self._kept)}")
            self._refuse_bypass(before)
            return self._pulled(len(PAIRS[len(cotangents)]), logp.device)
        finally:
            self._pass = "off"
            self._kept.clear()
            self._seen.clear()
            self._single, self._skipped = None, ()
            self._layouts.clear()
            self._arrangements.clear()
            self._found = {}
            del self._totals

    def _pulled(self, pairs: int, device: torch.device) -> Pulled:
        """Inner products of all parameters, in their order; 0 for those that were not measured, or not used."""
        dtype = wide_dtype(device)
        rows = self._responses, len(self._strata)
        none = tuple(torch.zeros((pairs, count), dtype=dtype, device=device) for count in rows)
        each = [self._found.get(name, none) for name in self._parameters]
        response, stratum = (torch.stack([x.to(dtype) for x in of], dim=-1) for of in zip(*each, strict=True))
        return Pulled(response, stratum)

    def _through(self, logp: Tensor, cotangents: Sequence[Tensor]) -> None:
        """The streams' backward passes: segment by segment where the graph can be divided."""
        if len(cotangents) == 1:
            self._pass = "other"
            torch.autograd.backward(logp, cotangents[0])
            return
        ours = {id(parameter) for name, parameter in self._parameters.items() if name not in self._skipped}
        # FSDP schedules its gathering by whole backward passes
        chain = None if self._sharded else segments(logp, ours)
        self._single = 1 - larger(cotangents)
        if chain is not None:
            sum_and_single(chain, logp, cotangents, self._single, self._turn)
            return
        self._pass = "single"
        with kept_whole(self._fsdp):
            torch.autograd.backward(logp, cotangents[self._single], retain_graph=True)
        self._pass = "other"
        torch.autograd.backward(logp, cotangents[1 - self._single])

    def _turn(self, which: Pass) -> None:
        self._pass = which

    def _refuse_bypass(self, before: dict[str, tuple[int, int] | None]) -> None:
        for name, version in before.items():
            if _version(self._parameters[name].grad) != version:
                raise ValueError(
                    f"{name} got a gradient that the fast path did not see: logp was computed before PCR(model) was "
                    "made, or the weight is used outside its layer (tied, or read by a fused kernel). Make PCR(model) "
                    "first; else use norms='loop' or leave the weight out of the blocks"
                )

    def arrived(
        self, node: Any, x: Tensor | None, weight: Tensor, dy: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients for autograd, see `probe.Receiver`; None for block parameters, whose gradients go to the totals."""
        path: str = node.path
        transposed = path in self._layers.transposed
        held = {} if self._pass == "off" else self._layers.members[path]
        members = {at: name for at, name in held.items() if name not in self._skipped} if self._skipped else held
        if members:
            self._refuse_unmeasurable(path, x)
            if self._pass == "single":
                self._kept[path] = dy
            else:
                assert x is not None
                with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                    self._measure(path, members, x, self._streams(path, dy), transposed)
        left = [name for name, want in zip(("weight", "bias"), wanted[1:], strict=True) if want and name not in members]
        dx = input_gradient(dy, weight, transposed) if wanted[0] else None
        return dx, *parameter_gradients(x, dy, left, transposed)

    def _streams(self, path: str, dy: Tensor) -> tuple[Tensor, ...]:
        """A layer's output gradient for each stream, in the pass of the other stream or of the sum."""
        if self._single is None:
            return (dy,)
        alone = self._kept.pop(path)
        other = dy - alone if self._pass == "sum" else dy
        return (alone, other) if self._single == 0 else (other, alone)

    def _refuse_unmeasurable(self, path: str, x: Tensor | None) -> None:
        again = (self._pass, path) in self._seen
        self._seen.add((self._pass, path))
        if again:
            raise ValueError(f"{path} is used twice in one forward pass; use PCR(..., norms='loop')")
        n = self._responses
        if path not in self._owners and (x is None or x.ndim != 3 or x.shape[0] != n):
            raise ValueError(
                f"{path} got input of shape {tuple(x.shape) if x is not None else ()}; the fast path expects ({n}, "
                "tokens, features), a row a response. Use norms='auto' or 'loop'"
            )

    def _by_response(self, path: str, x: Tensor, dys: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(n, tokens, features) of inputs and output gradients."""
        if path not in self._owners:
            return x, dys
        owners, n, lead = self._owners[path], self._responses, x.shape[:-1]
        key = (id(owners), lead)
        if key not in self._arrangements:
            self._arrangements[key] = arrangement(owners, n, tuple(lead))
        x, *arranged = (by_response(t, n, self._arrangements[key]) for t in (x, *dys))
        return x, tuple(arranged)

    def _measure(
        self, path: str, members: Mapping[str, str], x: Tensor, dys: tuple[Tensor, ...], transposed: bool
    ) -> None:
        on_cpu = not kernels.serve(x.device)
        if on_cpu:
            x, dys = self._by_response(path, x, dys)
        for attribute, name in members.items():
            parameter = self._parameters[name]
            products = self._tiled if on_cpu else self._fused
            found = products(path, attribute, x, dys, transposed)
            self._found[name] = found.response, found.stratum
            for total, part in zip(self._totals, found.totals, strict=True):
                add_total(total, name, reduce_scatter(part.to(total_dtype(parameter)), parameter))

    def _tiled(self, path: str, attribute: str, x: Tensor, dys: tuple[Tensor, ...], transposed: bool) -> Products:
        """Products of a weight or bias on a CPU, from activations (n, tokens, features)."""

        def products(dys: tuple[Tensor, ...]) -> Products:
            if attribute == "bias":
                return bias_products(dys, self._strata)
            return cpu.weight_products(x, dys, self._strata, transposed=transposed)

        return in_range(products, dys)

    def _fused(self, path: str, attribute: str, x: Tensor, dys: tuple[Tensor, ...], transposed: bool) -> Products:
        """Products of a weight or bias on an accelerator, from rows in any order; the host never waits."""
        owners, lead = self._owners.get(path), x.shape[:-1]
        key = (id(owners), lead)
        if key not in self._layouts:
            n = self._responses
            rows = np.arange(n) if owners is None else owners
            self._layouts[key] = Layout.owned(spread(rows, tuple(lead)), n, self._strata, x.device)
        if attribute == "bias":
            return kernels.vector_products(dys, self._layouts[key])
        return kernels.weight_products(x, dys, self._layouts[key], transposed=transposed, workspace=self._workspace)


def _version(grad: Tensor | None) -> tuple[int, int] | None:
    return None if grad is None else (id(grad), local(grad)._version)
