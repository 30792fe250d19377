"""Adapters for the array libraries, each imported only when it is asked for by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from pcr_conformance.adapter import Adapter
from pcr_conformance.cases import ObjectiveCase
from pcr_conformance.dense import DenseAdapter, Function, objective_flat


class StrictAdapter(DenseAdapter):
    """array-api-strict: nothing that the standard does not promise."""

    name = "array-api-strict"
    dtypes = ("float64", "float32")
    device = "CPU_DEVICE"

    def __init__(self) -> None:
        import array_api_strict

        self.xp = array_api_strict

    def from_numpy(self, x: Any, dtype: str) -> Any:
        return self.xp.asarray(super().from_numpy(x, dtype))

    def to_numpy(self, x: Any) -> Any:
        return super().to_numpy(x.__array__())

    def dtype_of(self, x: Any) -> str:
        return str(x.dtype).rsplit(".", 1)[-1]

    def device_of(self, x: Any) -> str:
        return str(x.device).split("'")[1] if "'" in str(x.device) else str(x.device)


class TorchAdapter(DenseAdapter):
    """PyTorch; `backend` None is eager, else a backend of torch.compile(fullgraph=True)."""

    dtypes = ("float64", "float32", "bfloat16", "float16")

    def __init__(self, backend: str | None = None, device: str = "cpu") -> None:
        import torch

        self.torch = torch
        self.device = device
        self.backend = backend
        self.compiled = backend is not None
        self.name = "torch" if backend is None else f"torch-compile-{backend}"
        self.eager = None if backend is None else TorchAdapter(device=device)
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


class JaxAdapter(DenseAdapter):
    """JAX, eager or under jit, with 64-bit floats or without (where sums are float32)."""

    def __init__(self, *, jit: bool = False, x64: bool = True) -> None:
        import jax

        self.jax = jax
        self.x64 = x64
        self.compiled = jit
        self.name = "jax" + ("" if x64 else "-x32") + ("-jit" if jit else "")
        self.dtypes = ("float64", "float32", "bfloat16", "float16")[0 if x64 else 1 :]
        self.accumulator = "float64" if x64 else "float32"
        self.eager = JaxAdapter(x64=x64) if jit else None
        self.device = str(jax.devices()[0])
        self._jitted: dict[Function, Any] = {}

    def scope(self) -> AbstractContextManager[Any]:
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

            def loss(which: int, x: Any) -> Any:
                return objective_flat((x, *others), options)[which].sum()

            grads = [self.jax.grad(partial(loss, which))(logp) for which in (0, 1)]
            return self.to_numpy(grads[0]), self.to_numpy(grads[1])


_MAKERS: dict[str, tuple[str, Callable[[], Adapter]]] = {
    "numpy": ("numpy", DenseAdapter),
    "array-api-strict": ("array_api_strict", StrictAdapter),
    "torch": ("torch", TorchAdapter),
    "torch-compile": ("torch", partial(TorchAdapter, "eager")),
    "torch-compile-aot": ("torch", partial(TorchAdapter, "aot_eager")),
    "jax": ("jax", JaxAdapter),
    "jax-jit": ("jax", partial(JaxAdapter, jit=True)),
    "jax-x32": ("jax", partial(JaxAdapter, x64=False)),
    "jax-x32-jit": ("jax", partial(JaxAdapter, jit=True, x64=False)),
}

NAMES = tuple(_MAKERS)


def missing(name: str) -> str | None:
    """Why the adapter cannot be made here, or None."""
    module = _MAKERS[name][0]
    return None if find_spec(module) is not None else f"{module} is not installed"


@cache
def library(name: str) -> Adapter:
    """The adapter of one of `NAMES`; kept, so that what it compiled is used again."""
    return _MAKERS[name][1]()
