"""JAX: pcr_core on its arrays, eager or under jit, and pcr_jax.resolve on one device or on several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from pcr_conformance.adapter import Resolved
from pcr_conformance.cases import Case, ObjectiveCase
from pcr_conformance.dense import DenseAdapter, Function, objective_flat
from pcr_conformance.devices import jax_device
from pcr_core import BlockStatistics, Rule, Weights


class JaxAdapter(DenseAdapter):
    """JAX, eager or under jit, with 64-bit floats or without (where sums are float32)."""

    def __init__(self, *, jit: bool = False, x64: bool = True, device: str | None = None) -> None:
        import jax

        self.jax = jax
        self.software = f"jax {jax.__version__}"
        self._asked = device
        self.x64 = x64
        self.compiled = jit
        self.name = "jax" + ("" if x64 else "-x32") + ("-jit" if jit else "")
        self.dtypes = ("float64", "float32", "bfloat16", "float16")[0 if x64 else 1 :]
        self.accumulator = "float64" if x64 else "float32"
        self.plain = JaxAdapter(x64=x64, device=device) if jit else None
        self.capabilities = frozenset({"objective", "grad", "compile"} if jit else {"objective", "grad"})
        self._jitted: dict[Function, Any] = {}
        self._derivatives: dict[Any, Any] = {}

    @cached_property
    def device(self) -> str:  # type: ignore[override]
        """Asked for late: it starts JAX, whose threads and devices are settled from then on."""
        return str(self.jax.devices()[0] if self._asked is None else jax_device(self._asked))

    @contextmanager
    def scope(self) -> Iterator[None]:
        place = nullcontext() if self._asked is None else self.jax.default_device(jax_device(self._asked))
        with self._precision(), place:
            yield

    def _precision(self) -> AbstractContextManager[Any]:
        if hasattr(self.jax, "enable_x64"):
            context: AbstractContextManager[Any] = self.jax.enable_x64(self.x64)
            return context
        from jax.experimental import enable_x64

        older: AbstractContextManager[Any] = enable_x64(self.x64)
        return older

    def from_numpy(self, x: Any, dtype: str) -> Any:
        with self.scope():
            named = {"int": "int64" if self.x64 else "int32", "bool": "bool"}
            return self.jax.numpy.asarray(np.asarray(x), dtype=named.get(dtype, dtype))

    def to_numpy(self, x: Any) -> Any:
        return np.asarray(x) if x.dtype == bool else np.asarray(x).astype(np.float64)

    def device_of(self, x: Any) -> str:
        return str(x.device)

    def run(self, function: Function, arrays: tuple[Any, ...], *static: Any) -> tuple[Any, ...]:
        if not self.compiled:
            return function(arrays, *static)
        if function not in self._jitted:
            self._jitted[function] = self.jax.jit(function, static_argnums=tuple(range(1, 1 + len(static))))
        out: tuple[Any, ...] = self._jitted[function](arrays, *static)
        return out

    def autodiff(self, case: ObjectiveCase, dtype: str) -> tuple[Any, Any] | None:
        with self.scope():
            logp, *others = self._tokens(case, dtype)
            options = tuple(case.options().items())
            grads = [self._derivative(which, options)(logp, others) for which in (0, 1)]
            return self.to_numpy(grads[0]), self.to_numpy(grads[1])

    def _derivative(self, which: int, options: tuple[tuple[str, Any], ...]) -> Any:
        """Of one of the losses with respect to logp; compiled, since eager derivatives are slow."""
        if (which, options) not in self._derivatives:

            def loss(logp: Any, others: Any) -> Any:
                return objective_flat((logp, *others), options)[which].sum()

            self._derivatives[which, options] = self.jax.jit(self.jax.grad(loss))
        return self._derivatives[which, options]


class ResolveAdapter(JaxAdapter):
    """`pcr_jax.resolve` on a tree with one leaf a block, under jit.

    `devices` > 1 splits the coordinates over them; `donate` gives up the plasticity gradient's memory for the update.
    """

    def __init__(self, devices: int = 1, donate: bool = False, device: str | None = None) -> None:
        super().__init__(device="cpu" if devices > 1 else device)  # several are those of the host
        self.name = "jax-donated" if donate else "jax-resolve" if devices == 1 else "jax-sharded"
        self.dtypes = ("float64", "float32")
        self.donate = donate
        self.capabilities = frozenset({"in_place"} if donate else {"sharded"} if devices > 1 else {})
        self.plain = ResolveAdapter(device=self._asked) if self.capabilities else None
        self.mesh = None
        if devices > 1:
            self.mesh = self.jax.make_mesh((devices,), ("model",), devices=self.jax.devices("cpu")[:devices])
        self._jitted_resolve: Any = None

    def _split(self, x: Any) -> Any:
        """On the mesh, along the coordinates where they divide evenly; copied to each device where not."""
        if self.mesh is None:
            return x
        from jax.sharding import NamedSharding, PartitionSpec

        even = x.shape[0] % self.mesh.size == 0
        return self.jax.device_put(x, NamedSharding(self.mesh, PartitionSpec("model") if even else PartitionSpec()))

    def resolve(self, case: Case, rule: Rule, dtype: str) -> Resolved:
        import pcr_jax
        from pcr_core import Scatter

        with self.scope():
            p, s, *_ = self._streams(case, dtype)
            wide = self.jax.numpy.float64
            trees = [
                {f"{i:03}": self._split(x[:, b].astype(wide).sum(0)) for i, b in enumerate(case.blocks())}
                for x in (p, s)
            ]
            dense = self.statistics(case, dtype)
            noise = (dense.plasticity_var, dense.stability_var, dense.covariance)
            scatter = Scatter(*(self.jax.numpy.asarray(x) for x in noise))
            if self._jitted_resolve is None:
                options: Any = {"static_argnames": ("rule", "blocks")}
                if self.donate:
                    options["donate_argnums"] = 0
                self._jitted_resolve = self.jax.jit(pcr_jax.resolve, **options)
            totals = trees[0]
            before = [x.unsafe_buffer_pointer() for x in totals.values()] if self.mesh is None else []
            layouts = [x.sharding for x in totals.values()]
            update, report = self._jitted_resolve(*trees, scatter, rule=rule, blocks="all")
            reused = self.donate and all(x.is_deleted() for x in totals.values())
            reused = reused and before == [x.unsafe_buffer_pointer() for x in update.values()]
            kept = all(x.sharding.is_equivalent_to(y, x.ndim) for x, y in zip(update.values(), layouts))
            whole = np.concatenate([np.asarray(update[k]) for k in sorted(update)])
            rounded = self.from_numpy(whole, dtype)
            weights = Weights(*(self.to_numpy(getattr(report.weights, f.name)) for f in fields(Weights)))
            # the update is rounded here, so it is judged here
            written = [bool(np.isfinite(self.to_numpy(rounded)[b]).all()) for b in case.blocks()]
            return Resolved(
                self.to_numpy(rounded),
                replace(weights, finite=weights.finite & np.asarray(written)),
                BlockStatistics(*(self.to_numpy(getattr(report.statistics, f.name)) for f in fields(BlockStatistics))),
                self.dtype_of(rounded),
                self.device_of(rounded),
                in_input_memory=reused,
                sharding_kept=self.mesh is not None and kept,
            )
