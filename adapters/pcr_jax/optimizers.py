"""What a compiled step asks of an optimizer, and what it gives it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

_LATE = (
    "optax.MultiSteps accumulates updates that are resolved already, one for each part of a batch; give the optimizer "
    "itself, and a larger batch with microbatch="
)


def check_optimizer(optimizer: Any) -> None:
    """Raises TypeError or ValueError for what is no transformation of gradients, or one that comes too late."""
    kind = type(optimizer)
    if kind.__module__.startswith("flax.") and hasattr(optimizer, "tx"):
        raise TypeError(
            f"optimizer: {kind.__module__}.{kind.__qualname__} holds a state of its own, which a step that is a pure "
            "function cannot change; give its optax transformation (optimizer.tx) and init_state(params, tx)"
        )
    if kind.__name__ == "MultiSteps" and kind.__module__.startswith("optax"):
        raise ValueError(f"optimizer: {_LATE}")
    if not callable(getattr(optimizer, "update", None)):
        raise TypeError(f"optimizer: expected an optax.GradientTransformation, got {kind.__name__}")


def init_optimizer(optimizer: Any, params: Any) -> Any:
    """Its first state, each array in memory of its own, since steps take the memory of a state.

    Some optimizers keep the first parameters, or one array in two places.
    """
    held = {id(x) for x in jax.tree.leaves(params)}

    def alone(x: Any) -> Any:
        if id(x) in held:
            return jnp.copy(x)
        held.add(id(x))
        return x

    return jax.tree.map(alone, optimizer.init(params))


def apply_optimizer(optimizer: Any, update: Any, state: Any, params: Any, loss: Array) -> tuple[Any, Any]:
    """Change of the parameters, and the next state. The loss is for optimizers that read it as `value`."""
    import optax

    for part in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.MultiStepsState)):
        if isinstance(part, optax.MultiStepsState):
            raise ValueError(f"optimizer: {_LATE}")
    with_value = optax.with_extra_args_support(optimizer)
    change, state = with_value.update(update, state, params, value=loss)
    return change, state
