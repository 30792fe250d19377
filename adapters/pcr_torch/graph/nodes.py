"""What a node of the autograd graph says of its operation: its name, its shapes, its dimensions.

PyTorch shows a node's name (`MulBackward0`), its saved arguments (`_saved_dim`) and the shapes of the gradients that it
takes (`_input_metadata`). The sets here are of names without the ending, as `kind_of` gives them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch.autograd.graph import Node

# fmt: off
ELEMENTWISE = {
    "Abs", "Add", "Alias", "Clamp", "ClampMax", "ClampMin", "Clone", "Div", "Elu", "Erf", "Exp", "Exp2", "Expm1",
    "Gelu", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "Log", "Log1P", "MaskedFill", "Maximum", "Minimum",
    "Mish", "Mul", "NativeDropout", "Neg", "Pow", "Reciprocal", "Relu", "Rsqrt", "Rsub", "Sigmoid", "Silu",
    "Softplus", "Sqrt", "Sub", "Tanh", "ToCopy", "Where",
}
# fmt: on
RESHAPING = {"ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View"}
NORMALISING = {"NativeLayerNorm", "FusedRmsNorm"}
ROW_FUNCTIONS = {("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")}

Shape = tuple[int, ...]


def kind_of(node: Node) -> str:
    """The operation's name: "Mul" of MulBackward0."""
    return _kind(node.name())


@cache
def _kind(name: str) -> str:
    return name.rstrip("0123456789").removesuffix("Backward")


def is_leaf(node: Any) -> bool:
    """Whether a node accumulates a tensor's gradient; functions written in Python may have any attributes."""
    return hasattr(node, "variable") and not hasattr(node, "_forward_cls")


def shape_of(node: Any, index: int) -> Shape:
    """Shape of a gradient that comes to a node."""
    return tuple(node._input_metadata[index].shape)


def signed(number: Any) -> Any:
    """The signed value of a saved argument that PyTorch shows as unsigned; None stays None."""
    return number - (1 << 64) if number is not None and number >= 1 << 63 else number


def dims_of(node: Any, count: int) -> list[int]:
    """The dimensions that an operation on `count` dimensions worked along; all of them by default."""
    saved = getattr(node, "_saved_dim", None)
    if saved is None or saved == ():
        return list(range(count))
    return [signed(dim) % count for dim in (saved if isinstance(saved, tuple) else (saved,))]
