"""Which of a model's parameters "mlp" chooses: by where they lie, and not by a list of architectures.

In every layer of the language model, each matrix that does not lie inside attention, a router, a norm, an embedding, a
convolution, a recurrence or a side path. An MLP's matrices may lie bare in their layer (`fc1`, `intermediate.dense`);
but where one layer of a list says which of its parts is the MLP, the others do so too. Matrices with numbers for names
(`Dense_0` to `Dense_5`) are taken where their shapes are those of one MLP; otherwise it is not clear what they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pcr_core._words import (
    ATTENTION,
    MLP,
    NORM,
    ROUTER,
    SIDE_PATH,
    holds_attention,
    is_attention_weight,
    is_foreign,
    is_gate,
    is_head,
    is_mixer,
    is_numbered,
    told_by_class,
    told_by_last_word,
    told_by_name,
    without_model_name,
    words,
)

VECTOR = "vector"
FOREIGN = "not of the language model"
OUTSIDE = "outside the layers"
UNCLEAR = "attention or MLP: its name does not tell"
_ARRAYS = {"weight", "kernel", "w"}  # names of what a module multiplies with

Shape: TypeAlias = tuple[int, ...]
Path: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A module along a parameter's path.

    Attributes:
        attribute: its name in the module that holds it.
        kind: name of its class; empty where nothing is known of classes.
        foreign: it is known to read what is no text, such as an encoder of pictures.
    """

    attribute: str
    kind: str = ""
    foreign: bool = False


@dataclass(frozen=True)
class Parameter:
    """A parameter and where it lies.

    Attributes:
        above: modules from the model down to the list of layers; all of them outside layers.
        layer: the element of the list, whose attribute is an index; None outside layers.
        inside: modules below the layer.
        leaf: its own name in the module that holds it.
        shape: without the dimension along which layers are stacked.
        model: name of the model's class; empty where nothing is known of classes.
        needs_layer: False where layers cannot always be seen; then a part named as an MLP is enough.
    """

    above: tuple[Part, ...]
    layer: Part | None
    inside: tuple[Part, ...]
    leaf: str
    shape: Shape
    model: str = ""
    needs_layer: bool = True

    @property
    def path(self) -> tuple[str, ...]:
        """Attributes down to the module that holds it."""
        return tuple(part.attribute for part in (*self.above, *filter(None, [self.layer]), *self.inside))


def left_out(parameters: Sequence[Parameter]) -> list[str | None]:
    """Why "mlp" leaves each of a model's parameters out; None for those that it chooses.

    Example:
        >>> layer = (Part("layers"),), Part("0")
        >>> up = Parameter(*layer, (Part("mlp"), Part("up_proj")), "weight", (8, 4))
        >>> query = Parameter(*layer, (Part("self_attn"), Part("q_proj")), "weight", (4, 4))
        >>> left_out([up, query])
        [None, 'attention']
    """
    holders = _holders(parameters)
    halves = _halves_of_mlps(parameters)
    found = [_told(parameter, halves, holders) for parameter in parameters]
    named = {_stack(parameter) for parameter, told in zip(parameters, found) if told == MLP}
    reasons: list[str | None] = []
    for parameter, told in zip(parameters, found):
        if told is None and parameter.layer is None:
            told = OUTSIDE
        elif told is None and _stack(parameter) in named:
            told = "beside the MLPs"
        reasons.append(None if told == MLP else told)
    untold = [k for k, told in enumerate(found) if told is None and reasons[k] is None]
    for k in _unclear(parameters, untold):
        reasons[k] = UNCLEAR
    return reasons


def _unclear(parameters: Sequence[Parameter], untold: Sequence[int]) -> Iterator[int]:
    """Those that only numbers tell apart, in layers where they do not have the shapes of one MLP."""
    layers: dict[Path, list[int]] = defaultdict(list)
    for k in untold:
        layers[parameters[k].path[: len(parameters[k].above) + 1]].append(k)
    for members in layers.values():
        numbered = any(is_numbered(_module(parameters[k])[-1]) for k in members)
        if numbered and not _is_mlp([parameters[k].shape for k in members]):
            yield from members


def _is_mlp(shapes: Sequence[Shape]) -> bool:
    """One matrix, `up` and `down`, or `gate`, `up` and `down`: attention has more, or has others."""
    if len(shapes) == 1:
        return True
    flipped = [shape[::-1] for shape in shapes]
    if len(shapes) == 2:
        return shapes[0] == flipped[1]
    once = [shape for shape in shapes if shapes.count(shape) == 1]  # `down`; none of three squares
    return len(shapes) == 3 and len(once) == 1 and flipped.count(once[0]) == 2


def _told(parameter: Parameter, halves: set[Path], holders: Mapping[Path, set[str]]) -> str | None:
    """MLP, another kind or reason, or None where nothing tells."""
    above, inside, leaf = parameter.above, parameter.inside, Part(parameter.leaf)
    if sum(size > 1 for size in parameter.shape) < 2 or {"bias", "scale"} & {*words(leaf.attribute)}:
        return VECTOR
    models = (parameter.model, *(part.kind for part in above))
    foreign = any(is_foreign(part.attribute, above_layers=True) for part in above)
    foreign |= any(is_foreign(part.attribute, above_layers=False) for part in (*inside, leaf))
    if foreign or any(part.foreign or _encodes(part, models) for part in (*above, *inside)):
        return FOREIGN
    if any(is_head(part.attribute) for part in above):
        return "output head"
    if parameter.layer is None and parameter.needs_layer:
        return OUTSIDE
    if any(told_by_name(part.attribute) == SIDE_PATH for part in above):
        return SIDE_PATH
    told = _kinds(parameter, models, halves)
    for kind in (
        ROUTER,
        NORM,
        ATTENTION,
        *sorted(told),
    ):  # a norm's MLP and attention's experts belong to norm and attention
        if kind in told and kind != MLP:
            return kind
    if MLP in told:
        return MLP
    path, layer = (*parameter.path, parameter.leaf), len(above) + (parameter.layer is not None)
    for k in range(layer, len(path)):
        if is_attention_weight(path[k], holders[path[:k]]) or (k > layer and holds_attention(holders[path[:k]])):
            return ATTENTION
    mixers = [part for part in inside if is_mixer(part.attribute) or is_mixer(part.kind)]
    return (told_by_class(mixers[0].kind) or "mixer") if mixers else None


def _kinds(parameter: Parameter, models: tuple[str, ...], halves: set[Path]) -> set[str]:
    """What the parts tell of, from the list of layers inwards."""
    told: set[str | None] = set()
    if parameter.layer is not None:
        told.add(told_by_last_word(parameter.above[-1].attribute if parameter.above else ""))
        told.add(told_by_last_word(without_model_name(parameter.layer.kind, models)))
    else:
        told |= {told_by_name(part.attribute) for part in parameter.above}
    inside = parameter.inside if parameter.layer is not None else parameter.above
    path = (*parameter.path, parameter.leaf)
    for depth, part in zip(range(len(path), 0, -1), reversed((*inside, Part(parameter.leaf)))):
        by_class = told_by_class(without_model_name(part.kind, models))
        if not (by_class == ATTENTION and MLP in told):  # a layer that is called by its attention may hold an MLP
            told.add(by_class)
        if is_gate(part.attribute) and path[:depth] not in halves:
            told.add(ROUTER)
        told.add(told_by_name(part.attribute))
    return {kind for kind in told if kind is not None}


def _halves_of_mlps(parameters: Sequence[Parameter]) -> set[Path]:
    """Gates whose matrices have the shapes of those of a module beside them, such as `up`; a router's have not."""
    matrices: dict[Path, dict[str, dict[Path, Shape]]] = defaultdict(lambda: defaultdict(dict))
    for parameter in parameters:
        module = _module(parameter)
        for k in range(len(module) if len(parameter.shape) > 1 else 0):
            matrices[module[:k]][module[k]][module[k + 1 :]] = parameter.shape
    return {
        (*holder, name)
        for holder, parts in matrices.items()
        for name, gate in parts.items()
        if is_gate(name)
        and any(gate.items() <= other.items() for beside, other in parts.items() if not is_gate(beside))
    }


def _holders(parameters: Sequence[Parameter]) -> dict[Path, set[str]]:
    """Attributes of each module."""
    found: dict[Path, set[str]] = defaultdict(set)
    for parameter in parameters:
        path = (*parameter.path, parameter.leaf)
        for k, attribute in enumerate(path):
            found[path[:k]].add(attribute)
    return found


def _module(parameter: Parameter) -> Path:
    """Path of the module whose weight it is; of the parameter itself where it is called otherwise."""
    return parameter.path if parameter.path and parameter.leaf in _ARRAYS else (*parameter.path, parameter.leaf)


def _stack(parameter: Parameter) -> Path | None:
    return None if parameter.layer is None else parameter.path[: len(parameter.above)]


def _encodes(part: Part, models: tuple[str, ...]) -> bool:
    of_class = {*words(without_model_name(part.kind, tuple(name for name in models if name != part.kind)))}
    return bool(of_class & {"vision", "audio"} and of_class & {"encoder", "tower", "model", "transformer"})
