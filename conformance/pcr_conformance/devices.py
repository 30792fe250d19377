"""Whether a device that was asked for is there, as each library names devices."""

from __future__ import annotations

from typing import Any


def refused(library: str, device: str) -> str | None:
    """Why a library's arrays cannot lie on a device such as "cpu" or "cuda:0", or None.

    Example:
        >>> refused("numpy", "cpu") is None, refused("numpy", "cuda:0")
        (True, 'numpy has arrays on the CPU only')
    """
    ask = {"torch": _torch, "jax": _jax, "cupy": _cupy}.get(library)
    if ask is not None:
        return ask(device)
    return None if device == "cpu" else f"{library} has arrays on the CPU only"


def jax_device(device: str) -> Any:
    """JAX's own object; ValueError with the reason where there is none."""
    import jax

    kind, index = _split(device)
    try:
        found = jax.devices(kind)
    except RuntimeError as error:
        raise ValueError(f"jax has no platform {kind!r} here ({error})") from None
    if index >= len(found):
        raise ValueError(f"jax finds {len(found)} device(s) of {kind!r}, counted from 0")
    return found[index]


def _split(device: str) -> tuple[str, int]:
    kind, _, index = device.partition(":")
    if not kind or (index and not index.isdigit()) or device.endswith(":"):
        raise ValueError("expected a kind and a number, such as cpu or cuda:0")
    return kind, int(index or 0)


def _torch(device: str) -> str | None:
    import torch

    try:
        kind, index = _split(device)
        torch.device(device)
    except (ValueError, RuntimeError) as error:
        return str(error).split("\n")[0]
    if kind not in ("cpu", "cuda"):
        return f"the laws need 64-bit floats and have been run with torch on cpu and cuda, not on {kind}"
    if kind == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "torch finds no GPU" if built else f"torch {torch.__version__} is built without CUDA"
    if kind == "cuda" and index >= torch.cuda.device_count():
        return f"torch finds {torch.cuda.device_count()} GPU(s), counted from 0"
    return None


def _jax(device: str) -> str | None:
    try:
        jax_device(device)
    except ValueError as error:
        return str(error)
    return None


def _cupy(device: str) -> str | None:
    import cupy

    try:
        kind, index = _split(device)
    except ValueError as error:
        return str(error)
    if kind != "cuda":
        return "cupy has arrays on CUDA devices only"
    count: int = cupy.cuda.runtime.getDeviceCount()
    return None if index < count else f"cupy finds {count} GPU(s), counted from 0"
