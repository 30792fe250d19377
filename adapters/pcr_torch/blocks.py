"""Which parameters PCR acts on, and how they are grouped into blocks.

"mlp" goes by the structure of the model, not by a list of architectures: in every layer of the language model (element
of the outermost `nn.ModuleList`, not of a vision or audio tower), each trainable matrix that does not lie inside
attention, a router, a norm, a convolution, a state-space mixer or a side path. That finds gate_proj,
up_proj, down_proj (Llama, Qwen, Mistral), c_fc, c_proj (GPT-2), fc1, fc2 (OPT), and LoRA's A and B inside them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import nn

from pcr_core._selection import selects

Granularity = Literal["tensor", "module", "layer", "global"]
Selector: TypeAlias = str | Callable[[str, nn.Parameter], bool | str | None]

# Whole words of attributes and class names: "SeedOssMLP" is seed, oss, mlp. The first kind that fits decides.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_TOWER = {"vision", "visual", "image", "images", "audio", "speech", "video", "tower", "projector", "connector", "vit"}
_RECURRENT = "state space or recurrence"
_NOT_MLP = {
    "attention": {"attn", "attention", "rotary"},
    "norm": {"norm", "layernorm", "rmsnorm", "ln"},
    "embedding": {"embed", "embedding", "embeddings", "embedder"},
    "convolution": {"conv", "convolution", "shortconv", "conv1d"},
    _RECURRENT: {"mamba", "mamba2", "ssm", "rglru", "recurrent", "deltanet", "rwkv"},
    "side path of a layer": {"altup", "laurel", "hyperconnection"},
}
_MLP = {"mlp", "ffn", "ffw", "feedforward", "moe", "experts", "expert"}
_SIDE = re.compile(r"^per_layer_|^(hc|hyper)_")  # inputs that a layer takes besides the residual stream
_ROUTER = re.compile(r"^(gate|router|shared_expert_gate|block_sparse_moe_gate|gate_weight)$")
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


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies: names and classes along its path, and the layer that holds it."""

    owner: str
    layer_path: str | None
    layer: int | None
    inside: tuple[tuple[str, str], ...]  # (attribute, class) of the modules below the layer, or below the model
    above: tuple[tuple[str, str], ...] = ()  # of those above the layer


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
        label = selects(blocks, name, parameter, _left_out(name, parameter, place) is None)
        if label is False:
            continue
        if not parameter.requires_grad:
            frozen.append(name)
            continue
        key = label if isinstance(label, str) else _block_name(name, place, granularity)
        chosen.setdefault(key, []).append((name, place))
    if not chosen:
        raise (FrozenBlocks if frozen else ValueError)(_nothing(model, blocks, frozen))
    return tuple(_block(key, members) for key, members in chosen.items())


def _left_out(name: str, parameter: nn.Parameter, place: _Place) -> str | None:
    """Why "mlp" leaves a parameter out; None where it does not."""
    if sum(size > 1 for size in parameter.shape) < 2 or "bias" in _words(name.rpartition(".")[2]):
        return "vector"
    for attribute, kind in (*place.above, *place.inside):
        of_class = _words(kind)
        encodes = of_class & {"vision", "audio"} and of_class & {"encoder", "tower", "model", "transformer"}
        if _words(attribute) & _TOWER or encodes:
            return "not of the language model"
    if place.layer is None:
        return "outside the layers"
    if any(_words(attribute) & _NOT_MLP["side path of a layer"] for attribute, _ in place.above):
        return "side path of a layer"
    parts = [*place.inside, (name.rpartition(".")[2], "")]
    for attribute, kind in reversed(parts):  # the innermost module that tells decides
        of_class, of_name = frozenset() if kind == "Conv1D" else _words(kind), _words(attribute)  # GPT-2's linear layer
        if _ROUTER.match(attribute) or "router" in of_name | of_class:
            return "router"
        if _SIDE.match(attribute):
            return "side path of a layer"
        sure = of_class & _MLP - {"moe"}  # moe is part of models' names
        for why, words in _NOT_MLP.items():
            if of_class & words and not (sure and why == _RECURRENT):  # as mamba and recurrent are
                return why
        if sure:  # whatever its attribute is called: Nemotron-H has MLPs named mixer
            return None
        for why, words in _NOT_MLP.items():
            if of_name & words:
                return why
        if of_name & _MLP:
            return None
        if "mixer" in of_name | of_class:
            return "mixer"
    return None


def _words(name: str) -> frozenset[str]:
    parts = [part.lower() for part in _WORD.findall(name)]
    joined = {a + b for a, b in itertools.pairwise(parts)}  # feed_forward, FeedForward, delta_net, conv_1d
    return frozenset(parts) | joined


def describe_blocks(model: nn.Module, blocks: Selector = "mlp", granularity: Granularity = "tensor") -> str:
    """A table of a model's matrices: how many are chosen, and why others are left out; a line for each kind.

    Example:
        >>> print(describe_blocks(nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)), "^0"))
        parameters  tensors  shape  blocks
        0.weight    1        3x2    chosen
        1.weight    1        1x3    left out: '^0' does not match
    """
    chosen = {name for block in select_blocks(model, blocks, granularity) for name in block.parameters}
    rows: dict[tuple[str, str, str], int] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 and name not in chosen:
            continue
        why = "chosen"
        if name not in chosen:
            reason = (
                f"{blocks!r} does not match" if blocks != "mlp" else _left_out(name, parameter, _place(model, name))
            )
            why = "left out: " + ("frozen" if not parameter.requires_grad and reason is None else str(reason))
        place = _place(model, name)
        kind = name if place.layer is None else name.replace(f".{place.layer}.", ".*.", 1)
        key = (
            re.sub(r"\.\d+(?=\.)", ".*", kind) if place.layer is not None else kind,
            "x".join(map(str, parameter.shape)),
            why,
        )
        rows[key] = rows.get(key, 0) + 1
    table = [("parameters", "tensors", "shape", "blocks")]
    table += [(kind, str(count), shape, why) for (kind, shape, why), count in rows.items()]
    widths = [max(len(row[k]) for row in table) for k in range(3)]
    return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3]]) for row in table)


def _place(model: nn.Module, name: str) -> _Place:
    owner = name.rpartition(".")[0]
    layer_path: str | None = None
    layer: int | None = None
    inside: list[tuple[str, str]] = []
    above: list[tuple[str, str]] = []
    parent: nn.Module = model
    for path, attribute, module in _walk(model, owner):
        if layer is None and isinstance(parent, nn.ModuleList) and attribute.isdigit():
            layer_path, layer, above, inside = path, int(attribute), inside, []
        else:
            inside.append((attribute, type(module).__name__))
        parent = module
    return _Place(owner, layer_path, layer, tuple(inside), tuple(above))


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
    stacks = {None if place.layer_path is None else place.layer_path.rpartition(".")[0] for _, place in members}
    layer = layers.pop() if len(layers) == 1 else None
    stack = stacks.pop() if len(stacks) == 1 else None
    return Block(key, layer, family, tuple(name for name, _ in members), stack)


def _family(name: str) -> str:
    parts = [part for part in name.split(".") if part not in ("weight", "default", "base_layer")] or [name]
    parts = [part for part in parts if not part.isdigit()] or parts
    return ".".join(parts[-2:]) if len(parts) > 1 and _ADAPTER.match(parts[-1]) else parts[-1]


def _nothing(model: nn.Module, blocks: Selector, frozen: list[str]) -> str:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    lora = any(_ADAPTER.match(part) for name in names for part in name.split("."))
    if blocks == "mlp" and lora:
        return (
            "blocks: 'mlp' matches no trainable parameter, since the LoRA adapters lie outside the MLPs, such as "
            f"{names[0]}. Give blocks='lora_' for all adapters, or adapt the MLPs (target_modules)"
        )
    if frozen:
        return (
            f"blocks: every parameter that {blocks!r} matches is frozen, such as {frozen[0]}; "
            "set requires_grad, or choose the adapter's parameters"
        )
    some = ", ".join(names[:: max(1, len(names) // 4)][:5]) or "none"
    hint = ""
    if blocks == "mlp":
        layers = {place.layer_path for place in (_place(model, name) for name in names) if place.layer is not None}
        hint = (
            f" Its {len(layers)} layers have no MLP that is told by its structure; a regular expression can say what "
            "to take."
            if layers
            else " 'mlp' needs layers in an nn.ModuleList; give a regular expression instead."
        )
        matrices = sorted({_family(name) for name in names if _in_layers(model, name)})
        if matrices:
            some_of_them = "|".join([name for name in matrices if name.endswith("_proj")][:2] or matrices[:1])
            hint += f" Their matrices are called {', '.join(matrices[:8])}; for example blocks={some_of_them!r}."
    return f"blocks: {blocks!r} matches no trainable parameter.{hint} Trainable parameters include: {some}"


def _in_layers(model: nn.Module, name: str) -> bool:
    parameter, place = model.get_parameter(name), _place(model, name)
    return place.layer is not None and _left_out(name, parameter, place) not in ("vector", "norm", None)
