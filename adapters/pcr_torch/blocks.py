"""Which parameters PCR acts on, and how they are grouped into blocks.

"mlp" goes by the structure of the model, not by a list of architectures: in every layer (element of the outermost
`nn.ModuleList`), each trainable matrix that does not lie inside attention, a router or a norm. That finds gate_proj,
up_proj, down_proj (Llama, Qwen, Mistral), c_fc, c_proj (GPT-2), fc1, fc2 (OPT), and LoRA's A and B inside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import nn

from pcr_core._selection import selects

Granularity = Literal["tensor", "module", "layer", "global"]
Selector: TypeAlias = str | Callable[[str, nn.Parameter], bool | str | None]

_NOT_MLP = re.compile(r"attn|attention|mixer|mamba|ssm|norm|embed|rotary", re.IGNORECASE)
_ROUTER = re.compile(r"^(gate|router|shared_expert_gate)$")
_ADAPTER = re.compile(r"^lora_")


@dataclass(frozen=True)
class Block:
    """A set of parameters that share one pair of weights.

    Attributes:
        name: the parameter, module or layer it is named after; "global" for all as one.
        layer: index of the layer it lies in, None outside layers and for "global".
        family: kind of module, the same in every layer, such as "gate_proj" or "gate_proj.lora_A".
        parameters: names as in `model.named_parameters()`.
    """

    name: str
    layer: int | None
    family: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies: names and classes along its path, and the layer that holds it."""

    owner: str
    layer_path: str | None
    layer: int | None
    inside: tuple[tuple[str, str], ...]  # (attribute, class) of the modules below the layer, or below the model


def select_blocks(model: nn.Module, blocks: Selector = "mlp", granularity: Granularity = "tensor") -> tuple[Block, ...]:
    """Blocks of a model's trainable parameters.

    Args:
        model: any module; frozen parameters are never part of a block.
        blocks: "mlp"; "all"; a regular expression searched for in parameter names; or a callable
            (name, parameter) -> True, False, or the name of the block to put it in.
        granularity: a block per "tensor", "module" (what lies directly in a layer, such as `layers.3.mlp`), "layer", or
            one "global" block. A callable that returns names overrides it.

    Raises:
        ValueError: nothing matches, or everything that matches is frozen.
        TypeError: `blocks` is neither a string nor a callable.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> [block.name for block in select_blocks(model, r"weight$")]
        ['0.weight', '1.weight']
    """
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity: expected one of {get_args(Granularity)}, got {granularity!r}")
    chosen: dict[str, list[tuple[str, _Place]]] = {}
    frozen: list[str] = []
    for name, parameter in model.named_parameters():
        place = _place(model, name)
        label = selects(blocks, name, parameter, _is_mlp(parameter, place))
        if label is False:
            continue
        if not parameter.requires_grad:
            frozen.append(name)
            continue
        key = label if isinstance(label, str) else _block_name(name, place, granularity)
        chosen.setdefault(key, []).append((name, place))
    if not chosen:
        raise ValueError(_nothing(model, blocks, frozen))
    return tuple(_block(key, members) for key, members in chosen.items())


def _is_mlp(parameter: nn.Parameter, place: _Place) -> bool:
    if place.layer is None or parameter.ndim < 2:
        return False
    return not any(_NOT_MLP.search(attr) or _NOT_MLP.search(kind) or _ROUTER.match(attr) for attr, kind in place.inside)


def _place(model: nn.Module, name: str) -> _Place:
    owner = name.rpartition(".")[0]
    layer_path: str | None = None
    layer: int | None = None
    inside: list[tuple[str, str]] = []
    parent: nn.Module = model
    for path, attribute, module in _walk(model, owner):
        if layer is None and isinstance(parent, nn.ModuleList) and attribute.isdigit():
            layer_path, layer, inside = path, int(attribute), []
        else:
            inside.append((attribute, type(module).__name__))
        parent = module
    return _Place(owner, layer_path, layer, tuple(inside))


def _walk(model: nn.Module, path: str) -> Iterator[tuple[str, str, nn.Module]]:
    module, walked = model, ""
    for attribute in path.split(".") if path else []:
        module = getattr(module, attribute)
        walked = f"{walked}.{attribute}" if walked else attribute
        yield walked, attribute, module


def _block_name(name: str, place: _Place, granularity: Granularity) -> str:
    if granularity == "tensor":
        return name
    if granularity == "global":
        return "global"
    if place.layer_path is None:
        return place.owner or name
    if granularity == "module" and place.inside:
        return f"{place.layer_path}.{place.inside[0][0]}"
    return place.layer_path


def _block(key: str, members: list[tuple[str, _Place]]) -> Block:
    layers = {place.layer for _, place in members}
    families = {_family(name) for name, _ in members}
    if len(families) == 1:
        family = families.pop()
    else:
        stem = re.sub(r"^.*\.\d+(\.|$)", "", key)
        family = stem or ("layer" if len(layers) == 1 else key)
    return Block(key, layers.pop() if len(layers) == 1 else None, family, tuple(name for name, _ in members))


def _family(name: str) -> str:
    parts = [part for part in name.split(".") if part not in ("weight", "default", "base_layer")] or [name]
    parts = [part for part in parts if not part.isdigit()] or parts
    return ".".join(parts[-2:]) if len(parts) > 1 and _ADAPTER.match(parts[-1]) else parts[-1]


def _nothing(model: nn.Module, blocks: Selector, frozen: list[str]) -> str:
    if frozen:
        return (
            f"blocks: every parameter that {blocks!r} matches is frozen, such as {frozen[0]}; "
            "set requires_grad, or choose the adapter's parameters"
        )
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    some = ", ".join(names[:: max(1, len(names) // 4)][:5]) or "none"
    lora = any(_ADAPTER.match(part) for name in names for part in name.split("."))
    if blocks == "mlp" and lora:
        return (
            "blocks: 'mlp' matches no trainable parameter, since the LoRA adapters lie outside the MLPs, such as "
            f"{names[0]}. Give blocks='lora_' for all adapters, or adapt the MLPs (target_modules)"
        )
    hint = " 'mlp' needs layers in an nn.ModuleList; give a regular expression instead." if blocks == "mlp" else ""
    return f"blocks: {blocks!r} matches no trainable parameter.{hint} Trainable parameters include: {some}"
