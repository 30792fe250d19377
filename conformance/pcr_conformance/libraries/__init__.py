"""Our adapters by name, and `load` for those of others; each is imported only when it is asked for."""

from __future__ import annotations

import inspect
import os
import re
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pcr_conformance.adapter import Adapter, missing_members
from pcr_conformance.devices import refused
from pcr_conformance.factory import make

#: name: the library it needs, the class, and its arguments
_MAKERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "numpy": ("numpy", "libraries.numpy:NumpyAdapter", {}),
    "array-api-strict": ("array_api_strict", "libraries.strict:StrictAdapter", {}),
    "torch": ("torch", "libraries.torch:TorchAdapter", {}),
    "torch-compile": ("torch", "libraries.torch:TorchAdapter", {"backend": "eager"}),
    "torch-compile-aot": ("torch", "libraries.torch:TorchAdapter", {"backend": "aot_eager"}),
    "torch-in-place": ("torch", "libraries.torch:InPlaceAdapter", {}),
    "jax": ("jax", "libraries.jax:JaxAdapter", {}),
    "jax-jit": ("jax", "libraries.jax:JaxAdapter", {"jit": True}),
    "jax-x32": ("jax", "libraries.jax:JaxAdapter", {"x64": False}),
    "jax-x32-jit": ("jax", "libraries.jax:JaxAdapter", {"jit": True, "x64": False}),
    "jax-resolve": ("jax", "libraries.jax:ResolveAdapter", {}),
    "jax-donated": ("jax", "libraries.jax:ResolveAdapter", {"donate": True}),
    "jax-sharded": ("jax", "libraries.jax:ResolveAdapter", {"devices": 4}),
    "cupy": ("cupy", "libraries.cupy:CupyAdapter", {}),
}

NAMES = tuple(_MAKERS)


def missing(name: str) -> str | None:
    """Why the adapter cannot be made here, or None."""
    module = _MAKERS[name][0]
    if find_spec(module) is None:
        return f"{module} is not installed"
    if name == "jax-sharded":
        # asking JAX would start it, whose threads and devices are settled from then on
        found = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
        if found is None or int(found[1]) < 4:
            return "needs XLA_FLAGS=--xla_force_host_platform_device_count=4"
    if name == "cupy":
        import cupy

        if not cupy.is_available():
            return "cupy finds no GPU"
    return None


@cache
def library(name: str, device: str | None = None) -> Adapter:
    """The adapter of one of `NAMES`; kept, so that what it compiled is used again."""
    needs, place, options = _MAKERS[name]
    if device is not None and needs in ("torch", "jax", "cupy"):  # the others have one device
        options = options | {"device": device}
    module, attribute = place.split(":")
    made: Adapter = getattr(import_module(f"pcr_conformance.{module}"), attribute)(**options)
    return made


@cache
def load(spec: str, device: str | None = None) -> Adapter:
    """An adapter of ours by name, or "module:factory", where factory makes an adapter or is one.

    Args:
        spec: a name or "module:factory".
        device: where its arrays shall lie, such as "cuda:0"; a factory is called with `device=`. None leaves it to
            the adapter.

    Raises:
        ValueError: no such name, module, attribute or device, or the adapter's library is missing.
        TypeError: the object lacks something of the protocol; says what, with the signature to write.
    """
    if spec in _MAKERS:
        reason = missing(spec)
        if reason:
            raise ValueError(f"adapter {spec!r}: {reason}")
        if device is not None:
            reason = refused(_MAKERS[spec][0], device)
            if spec == "jax-sharded" and device != "cpu":
                reason = "its arrays are split over four devices of the host"
            if reason:
                raise ValueError(f"adapter {spec!r} on device {device!r}: {reason}")
        return library(spec, device)
    module, _, attribute = spec.partition(":")
    if not attribute:
        raise ValueError(f"adapter {spec!r}: expected module:factory, or one of {', '.join(NAMES)}")
    try:
        factory = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"adapter {spec!r}: {error}") from error
    options = {} if device is None else {"device": device}
    if options and not (callable(factory) and _takes_device(factory)):
        raise ValueError(
            f"adapter {spec!r} on device {device!r}: its factory takes no device; give it a parameter of that name, or "
            "leave --device out"
        )
    found: Adapter = make(f"adapter {spec!r}", factory, options, missing_members)
    return found


def _takes_device(factory: Any) -> bool:
    parameters = inspect.signature(factory).parameters.values()
    return any(p.name == "device" or p.kind is p.VAR_KEYWORD for p in parameters)
