"""A number that is a float to Python and a tensor with a graph to torch, so that what it multiplies can be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


class TaggedFloat(float):
    """Prints, compares, rounds and serialises as the float it is; in products and sums `tensor` takes its place.

    Example:
        >>> import torch
        >>> tag = torch.ones((), requires_grad=True)
        >>> beta = TaggedFloat(0.25, tag * 0.25)
        >>> beta, round(2 * beta, 1), (2 * beta * torch.ones(2)).requires_grad
        (0.25, 0.5, True)
    """

    tensor: Tensor

    def __new__(cls, value: float, tensor: Tensor) -> TaggedFloat:
        made = super().__new__(cls, value)
        made.tensor = tensor
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)  # graphs can be neither copied nor saved

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_tensor, (args, kwargs or {}))
        return function(*args, **kwargs)


def _tensor(value: Any) -> Any:
    return value.tensor if isinstance(value, TaggedFloat) else value


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: TaggedFloat, *others: Any) -> Any:
        if not all(isinstance(other, int | float | Tensor) for other in others):
            return NotImplemented
        result = getattr(self.tensor, name)(*map(_tensor, others))
        if any(isinstance(other, Tensor) for other in others):
            return result
        value = getattr(float, name)(float(self), *map(float, others))
        return TaggedFloat(value, result) if isinstance(value, float) else value

    return apply


for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(TaggedFloat, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(TaggedFloat, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ("neg", "pos", "abs"):
    setattr(TaggedFloat, f"__{_name}__", _operator(f"__{_name}__"))
