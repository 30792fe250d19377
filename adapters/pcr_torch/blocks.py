"""Which parameters PCR acts on, and how they are grouped into blocks.

"mlp" goes by the structure of the model, not by a list of architectures: `pcr_core._structure` holds the rules, here is
read what they need of a torch model. A layer is an element of the outermost `nn.ModuleList`. That finds gate_proj,
up_proj, down_proj (Llama, Qwen, Mistral), c_fc, c_proj (GPT-2), fc1, fc2 (OPT), and LoRA's A and B inside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from pcr_core._listing import candidates, cannot_tell, listing, not_selected
from pcr_core._selection import selects
from pcr_core._structure import Parameter, Part, left_out

Granularity = Literal["tensor", "module", "layer", "global"]
Selector: TypeAlias = str | Callable[[str, nn.Parameter], bool | str | None]

_ADAPTER = re.compile(r"^lora_")


@dataclass(frozen=True)
class Block:
    """A set of parameters that share one pair of weights.

    Attributes:
        name: the parameter, module or layer it is named after; "global" for all as one.
        layer: index of the layer it lies in, None outside layers and for "global".
        family: kind of module, the same in every layer, such as "gate_proj" or "gate_proj.lora_A".
        parameters: names as in `model.named_parameters()`.
        stack: path of the list that its layer is in; None outside layers and where there are several.
    """

    name: str
    layer: int | None
    family: str
    parameters: tuple[str, ...]
    stack: str | None = None


class FrozenBlocks(ValueError):
    """Everything that was chosen is frozen."""


def select_blocks(model: nn.Module, blocks: Selector = "mlp", granularity: Granularity = "tensor") -> tuple[Block, ...]:
    """Blocks of a model's trainable parameters.

    Args:
        model: any module; frozen parameters are never part of a block.
        blocks: "mlp"; "all"; a regular expression searched for in parameter names; or a callable
            (name, parameter) -> True, False, or the name of the block to put it in.
        granularity: a block per "tensor", "module" (what lies directly in a layer, such as `layers.3.mlp`), "layer", or
            one "global" block. A callable that returns names overrides it.

    Raises:
        ValueError: nothing matches, everything that matches is frozen, a trainable parameter is quantised, or "mlp"
            finds layers of numbered matrices, of which it cannot tell which are attention's.
        TypeError: `blocks` is neither a string nor a callable.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> [block.name for block in select_blocks(model, r"weight$")]
        ['0.weight', '1.weight']
    """
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity: expected one of {get_args(Granularity)}, got {granularity!r}")
    chosen: dict[str, list[tuple[str, Parameter]]] = {}
    frozen: list[str] = []
    places = _places(model)
    reasons = _reasons(places, blocks)
    trained = [(place, why) for (name, place), why in zip(places.items(), reasons) if _is_trained(model, name)]
    if unclear := cannot_tell([place for place, _ in trained], [why for _, why in trained], "."):
        raise ValueError(unclear)
    for (name, place), reason in zip(places.items(), reasons):
        parameter = model.get_parameter(name)
        label = selects(blocks, name, parameter, reason is None)
        if label is False:
            continue
        if not parameter.requires_grad:
            frozen.append(name)
            continue
        _refuse_quantised(name, parameter)
        key = label if isinstance(label, str) else _block_name(name, place, granularity)
        chosen.setdefault(key, []).append((name, place))
    if not chosen:
        raise (FrozenBlocks if frozen else ValueError)(_nothing(model, blocks, frozen))
    return tuple(_block(key, members) for key, members in chosen.items())


def describe_blocks(model: nn.Module, blocks: Selector = "mlp") -> str:
    """A table of a model's parameters: what is chosen, what is left out and why; a line for each kind.

    It raises nothing where nothing is chosen, so that it shows why.

    Args:
        model: as of `select_blocks`.
        blocks: as of `select_blocks`.

    Example:
        >>> print(describe_blocks(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False)), "weight"))
        parameters  tensors  shape  blocks
        0.weight    1        3x2    chosen
        0.bias      1        3      left out: 'weight' does not match
        1.weight    1        1x3    chosen
    """
    places, rows = _places(model), []
    for (name, place), reason in zip(places.items(), _reasons(places, blocks)):
        chosen = selects(blocks, name, model.get_parameter(name), reason is None) is not False
        why = None if chosen and _is_trained(model, name) else "frozen" if chosen else not_selected(blocks, reason)
        rows.append((name, place.shape, f"left out: {why}" if why else "chosen"))
    return listing(rows)


def _is_trained(model: nn.Module, name: str) -> bool:
    return model.get_parameter(name).requires_grad


def _reasons(places: dict[str, Parameter], blocks: Selector) -> list[str | None]:
    return left_out([*places.values()]) if blocks == "mlp" else [None] * len(places)


def _places(model: nn.Module) -> dict[str, Parameter]:
    """Where each parameter lies, by its name."""
    foreign = _reads_no_text(model) and not _generates(model)
    return {name: _place(model, name, tuple(p.shape), foreign) for name, p in model.named_parameters()}


def _place(model: nn.Module, name: str, shape: tuple[int, ...], foreign: bool) -> Parameter:
    path, _, leaf = name.rpartition(".")
    above: list[Part] = []
    layer: Part | None = None
    inside: list[Part] = []
    parent = model
    for attribute, module in _walk(model, path):
        encoder = "encoder" in attribute or "Encoder" in type(module).__name__
        part = Part(attribute, type(module).__name__, foreign or (encoder and _reads_no_text(module)))
        if layer is None and isinstance(parent, nn.ModuleList) and attribute.isdigit():
            layer = part
        else:
            (above if layer is None else inside).append(part)
        parent = module
    return Parameter(tuple(above), layer, tuple(inside), leaf, shape, type(model).__name__)


def _walk(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    module = model
    for attribute in path.split(".") if path else []:
        module = getattr(module, attribute)
        yield attribute, module


def _reads_no_text(module: nn.Module) -> bool:
    """As models of transformers say of themselves."""
    first, kinds = getattr(module, "main_input_name", "input_ids"), getattr(module, "input_modalities", "text")
    return first not in ("input_ids", "inputs_embeds") or "text" not in (kinds or "text")


def _generates(model: nn.Module) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return can_generate is None or bool(can_generate())


def _layer_path(place: Parameter) -> str | None:
    return None if place.layer is None else ".".join(place.path[: len(place.above) + 1])


def _block_name(name: str, place: Parameter, granularity: Granularity) -> str:
    if granularity == "tensor":
        return name
    if granularity == "global":
        return "global"
    layer = _layer_path(place)
    if layer is None:
        return ".".join(place.path) or name
    return f"{layer}.{place.inside[0].attribute}" if granularity == "module" and place.inside else layer


def _block(key: str, members: list[tuple[str, Parameter]]) -> Block:
    layers = {None if place.layer is None else int(place.layer.attribute) for _, place in members}
    families = {_family(name) for name, _ in members}
    if len(families) == 1:
        family = families.pop()
    else:
        stem = re.sub(r"^.*\.\d+(\.|$)", "", key)
        family = stem or ("layer" if len(layers) == 1 else key)
    stacks = {None if (path := _layer_path(place)) is None else path.rpartition(".")[0] for _, place in members}
    layer = layers.pop() if len(layers) == 1 else None
    stack = stacks.pop() if len(stacks) == 1 else None
    return Block(key, layer, family, tuple(name for name, _ in members), stack)


def _family(name: str) -> str:
    parts = [part for part in name.split(".") if part not in ("weight", "default", "base_layer")] or [name]
    parts = [part for part in parts if not part.isdigit()] or parts
    return ".".join(parts[-2:]) if len(parts) > 1 and _ADAPTER.match(parts[-1]) else parts[-1]


def _refuse_quantised(name: str, parameter: nn.Parameter) -> None:
    """ValueError for a trainable parameter whose numbers are not those of an ordinary tensor."""
    kind = type(parameter)
    ordinary = kind.__torch_dispatch__ is nn.Parameter.__torch_dispatch__ or issubclass(kind, (DTensor, FakeTensor))
    if not ordinary or hasattr(parameter, "quant_state"):
        raise ValueError(
            f"blocks: {name} is quantised (a {kind.__name__}), and gradients are combined of ordinary numbers; freeze "
            "it and train LoRA adapters, which may be blocks over quantised weights, or leave it out of the blocks"
        )


def _nothing(model: nn.Module, blocks: Selector, frozen: list[str]) -> str:
    places = {name: place for name, place in _places(model).items() if model.get_parameter(name).requires_grad}
    names = [*places]
    lora = any(_ADAPTER.match(part) for name in names for part in name.split("."))
    if blocks == "mlp" and lora:
        return (
            "blocks: 'mlp' matches no trainable parameter, since the LoRA adapters lie outside the MLPs, such as "
            f"{names[0]}. Give blocks='lora_' for all adapters, or adapt the MLPs (target_modules)"
        )
    if frozen and not model.get_parameter(frozen[0]).is_floating_point():
        return (
            f"blocks: {frozen[0]}, which {blocks!r} matches, is quantised and cannot be trained; put LoRA adapters on "
            "such layers (target_modules), or choose the parameters of the adapters that are there"
        )
    if frozen:
        return (
            f"blocks: every parameter that {blocks!r} matches is frozen, such as {frozen[0]}; "
            "set requires_grad, or choose the adapter's parameters"
        )
    hint = ""
    if blocks == "mlp":
        hint = candidates([*places.values()], left_out([*places.values()]), [*map(_family, names)])
        hint = hint or " 'mlp' needs layers in an nn.ModuleList; give a regular expression instead."
    some = ", ".join(names[:: max(1, len(names) // 4)][:5]) or "none"
    return f"blocks: {blocks!r} matches no trainable parameter.{hint} Trainable parameters include: {some}"
