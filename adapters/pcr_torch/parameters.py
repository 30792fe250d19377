"""What has to hold of a model's parameters whenever a micro-batch comes; users may have changed them meanwhile."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor import DTensor


def check_parameters(model: nn.Module, blocks: Mapping[str, nn.Parameter], *, fast: bool, sharded: bool) -> None:
    """ValueError for parameters that were replaced, frozen, or have hooks that would not run as they should.

    Args:
        model: as `PCR` holds it.
        blocks: the block parameters by name, as they were when `PCR` was made.
        fast: whether the fast path measures them.
        sharded: whether they are sharded, so that the model swaps them around its forward.
    """
    _refuse_replaced(model, blocks, sharded)
    _refuse_hooked(model, blocks, fast)
    for name, parameter in blocks.items():
        if not parameter.requires_grad:
            raise ValueError(f"{name} is in a block and was frozen after PCR(model) was made; make PCR(model) again")


def _refuse_hooked(model: nn.Module, blocks: Mapping[str, nn.Parameter], fast: bool) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad and getattr(parameter, "_post_accumulate_grad_hooks", None):
            name = next(name for name, p in model.named_parameters() if p is parameter)
            raise ValueError(
                f"{name} has a post-accumulate-grad hook, which would run before its gradient is resolved "
                "(optimizers that step within the backward pass register such); step after resolve() instead"
            )
    for name, parameter in blocks.items():
        if fast and parameter._backward_hooks:
            raise ValueError(
                f"{name} is in a block and has a hook on its gradient, which the fast path does not run; use "
                "norms='loop' (it runs for every response and stream), or change .grad after resolve()"
            )


def _refuse_replaced(model: nn.Module, blocks: Mapping[str, nn.Parameter], sharded: bool) -> None:
    for name, parameter in blocks.items():
        owner, _, attribute = name.rpartition(".")
        now = getattr(model.get_submodule(owner), attribute, None)
        if now is not parameter and (isinstance(now, DTensor) or not sharded):
            raise ValueError(
                f"{name} is not the parameter that PCR(model) was made with; sharding, moving or loading the model "
                "replaced it. Make PCR(model) after that, and before the forward pass"
            )
