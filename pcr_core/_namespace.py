"""What the core needs from an array library, and how it finds out.

Everything in `pcr_core` speaks the array-API standard through `array-api-compat`. Three questions remain that the
standard leaves open; they are answered here and nowhere else:

- Do these arguments belong together? Arrays of two libraries or devices, lists and integers are refused by name.
- How wide can sums be accumulated? float64 where the device has it, float32 elsewhere (JAX without x64, Apple MPS).
- May values be looked at? Not while JAX or torch.compile traces; checks on values are skipped then, and what they
  would have caught comes out as NaN.
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import array_api_compat

ArrayT = TypeVar("ArrayT")


def common_namespace(**arrays: Any) -> Any:
    """The array namespace shared by all arguments that are not None; TypeError naming the odd one out."""
    named = {name: value for name, value in arrays.items() if value is not None}
    for name, value in named.items():
        if not array_api_compat.is_array_api_obj(value):
            raise TypeError(
                f"{name}: expected an array of NumPy, PyTorch, JAX or another array-API library, "
                f"got {type(value).__module__}.{type(value).__qualname__}"
            )
    try:
        xp = array_api_compat.array_namespace(*named.values())
    except TypeError as error:
        kinds = ", ".join(f"{name} is {type(value).__module__}" for name, value in named.items())
        raise TypeError(f"all arrays must come from one library, but {kinds}") from error
    devices = {name: device_of(value) for name, value in named.items() if not is_traced(value)}
    if len({str(device) for device in devices.values()}) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all arrays must lie on one device, but {where}")
    return xp


def is_traced(*arrays: Any) -> bool:
    """Whether values cannot be looked at: a JAX transformation or torch.compile is tracing."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        return True
    jax = sys.modules.get("jax")
    return jax is not None and any(isinstance(array, jax.core.Tracer) for array in arrays)


def device_of(array: Any) -> Any:
    """For creating arrays beside this one; None (the default device) for JAX tracers, which have none yet."""
    if array_api_compat.is_jax_array(array) and is_traced(array):
        return None
    return array_api_compat.device(array)


def require_floating(xp: Any, **arrays: Any) -> None:
    """TypeError unless every argument that is not None has a real floating dtype (bfloat16 included)."""
    for name, value in arrays.items():
        if value is None:
            continue
        try:
            floating = xp.isdtype(value.dtype, "real floating")
        except TypeError:  # NumPy does not know the dtypes that ml_dtypes adds
            floating = str(value.dtype) == "bfloat16"
        if not floating:
            raise TypeError(f"{name}: expected a real floating dtype, got {value.dtype}; cast it first")


def require_shape(shape: tuple[int | None, ...], meaning: str, **arrays: Any) -> None:
    """ValueError unless every argument that is not None has this shape; None in `shape` matches any length."""
    for name, value in arrays.items():
        if value is None:
            continue
        got = tuple(value.shape)
        fits = len(got) == len(shape) and all(w is None or g == w for g, w in zip(got, shape))
        if not fits:
            expected = ", ".join("any" if w is None else str(w) for w in shape) + ("," if len(shape) == 1 else "")
            raise ValueError(f"{name}: expected shape ({expected}) - {meaning} - got {got}")


def widest_float(xp: Any, array: Any) -> Any:
    """float64 if the array's device has it, else float32."""
    if array_api_compat.is_torch_array(array):
        return xp.float32 if array.device.type == "mps" else xp.float64
    if array_api_compat.is_numpy_array(array):
        return xp.float64
    info = xp.__array_namespace_info__()
    return xp.float64 if "float64" in info.dtypes(kind="real floating") else xp.float32


def at_least_float32(xp: Any, array: Any) -> Any:
    """The array itself if float32 or float64, else (bfloat16, float16) its float32 copy."""
    return array if array.dtype in (xp.float32, xp.float64) else xp.astype(array, xp.float32)
