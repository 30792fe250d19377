"""Where a traced model multiplies by its kernels, and the same model with these products tapped.

A tapped product gets one more argument, a probe, that has no part in the result and whose "cotangent" is not a
derivative but a carrier: the pair (x, dy) of the product's input and its output's gradient. They are all that the
gradients of single responses, G_i = x_i^T dy_i, are made of. The model needs no marks for it: parameters are followed
through its equations, into jit, remat and scan.

Why the probe does not carry |G_i|^2 itself: p_i.s_i needs both streams, and a pullback sees one. Polarisation,
2 t p.s = |p + t s|^2 - |p|^2 - t^2 |s|^2, costs a third pullback, and with t = 1 its error is 1e-7 (|p|/|s| + |s|/|p|)
of |p||s|; plasticity is often a hundred times the larger.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Literal

from pcr_jax.kernel_view import VIEWS, Tap, View, keeps_all

Key: TypeAlias = tuple[int, ...]  # of an equation: its index, after those of the equations that it lies inside of
Probe: TypeAlias = tuple[Array, Array]
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
_REMAT = frozenset({"checkpoint", "remat", "remat2"})


@dataclass
class Found:
    """What `find` saw: the products with a kernel, by equation, and why a parameter cannot be measured by them."""

    taps: dict[Key, Tap] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)

    def of(self, leaf: int) -> dict[Key, Tap]:
        return {key: tap for key, tap in self.taps.items() if tap.kernel.leaf == leaf}


def find(closed: Any, watched: Collection[int]) -> Found:
    """Follow some of the inputs of a closed jaxpr; the reason in `faults` continues "<name of the parameter> ..."."""
    found = Found()
    outputs = _follow(closed.jaxpr, {closed.jaxpr.invars[k]: View(k) for k in watched}, (), found)
    for view in outputs:
        if view is not None:
            found.faults.setdefault(view.leaf, "is an output of the model")
    for leaf in watched:
        taps = list(found.of(leaf).values())
        if not taps:
            found.faults.setdefault(leaf, "reaches no matrix product")
        if any(tap.layout != taps[0].layout for tap in taps):
            found.faults.setdefault(leaf, "is used by several products in different layouts (tied weights)")
    return found


def _follow(jaxpr: Any, views: dict[Any, View], key: Key, found: Found) -> list[View | None]:
    """Notes taps and faults; views of the outputs."""
    for index, equation in enumerate(jaxpr.eqns):
        name, here = equation.primitive.name, (*key, index)
        seen = [None if isinstance(v, Literal) else views.get(v) for v in equation.invars]
        hits = [view for view in seen if view is not None]
        if not hits:
            continue
        outputs: Sequence[View | None] = ()
        if name in VIEWS and seen[0] is not None and keeps_all(equation):
            outputs = [seen[0].through(equation)]
        elif name == "dot_general" and len(hits) == 1:
            found.taps[here] = _tap(equation, hits[0], right=seen[0] is None)
        elif name in CALLS or name in _REMAT:
            inner = _inner(equation)
            outputs = _follow(inner, _named(inner.invars, seen), here, found)
        elif name == "scan":
            outputs = _follow_scan(equation, seen, here, found)
        else:
            how = "is multiplied by another parameter" if name == "dot_general" else f"is read by {name}"
            for view in hits:
                found.faults.setdefault(view.leaf, how)
        views.update(_named(equation.outvars, outputs))
    return [None if isinstance(v, Literal) else views.get(v) for v in jaxpr.outvars]


def _follow_scan(equation: Any, seen: Sequence[View | None], here: Key, found: Found) -> list[View | None]:
    consts, carried, length = (equation.params[name] for name in ("num_consts", "num_carry", "length"))
    inner = equation.params["jaxpr"].jaxpr
    inside: list[View | None] = []
    for place, view in enumerate(seen):
        if view is not None and consts <= place < consts + carried:
            found.faults.setdefault(view.leaf, "is carried from turn to turn of a scan")
            view = None
        inside.append(None if view is None else view.inside_scan(length, sliced=place >= consts))
    for view in _follow(inner, _named(inner.invars, inside), here, found):
        if view is not None:
            found.faults.setdefault(view.leaf, "is handed back by a scan")
    return []


def _tap(equation: Any, kernel: View, *, right: bool) -> Tap:
    (left_in, right_in), (left_batch, right_batch) = equation.params["dimension_numbers"]
    contracted, batched, operands = (left_in, right_in), (left_batch, right_batch), equation.invars
    if not right:
        contracted, batched, operands = contracted[::-1], batched[::-1], operands[::-1]
    x, y = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in (operands[0], equation.outvars[0]))
    return Tap(kernel, tuple(operands[1].aval.shape), x, y, contracted, batched, right)


def evaluate(closed: Any, inputs: Sequence[Any], taps: Mapping[Key, Tap], probes: Mapping[Key, Probe]) -> list[Any]:
    """The traced function, with its products at `taps` tapped; `probes` have the same keys."""
    return _evaluate(closed.jaxpr, closed.consts, inputs, taps, probes)


def inline(closed: Any, inputs: Sequence[Any]) -> list[Any]:
    """The traced function, with the bodies of its outermost jits in their place."""
    return _evaluate(closed.jaxpr, closed.consts, inputs, {}, {}, inlining=True)


def _evaluate(
    jaxpr: Any,
    consts: Sequence[Any],
    inputs: Sequence[Any],
    taps: Mapping[Key, Tap],
    probes: Mapping[Key, Probe],
    *,
    inlining: bool = False,
) -> list[Any]:
    values: dict[Any, Any] = {}
    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for index, equation in enumerate(jaxpr.eqns):
        given = [read(v) for v in equation.invars]
        below = {key[1:]: tap for key, tap in taps.items() if key[0] == index}
        mine = {key[1:]: probe for key, probe in probes.items() if key[0] == index}
        if inlining and equation.primitive.name in CALLS:
            outputs = _evaluate(_inner(equation), _consts(equation), given, {}, {})
        else:
            outputs = _tapped(equation, given, below, mine) if below else _bind(equation, given)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _tapped(equation: Any, given: list[Any], taps: Mapping[Key, Tap], probes: Mapping[Key, Probe]) -> list[Any]:
    name = equation.primitive.name
    if name == "dot_general":
        right = taps[()].right
        x, kernel = given if right else reversed(given)
        return [_tapped_product(equation, right)(x, kernel, probes[()])]
    if name == "scan":
        return _tapped_scan(equation, given, taps, probes)
    inner = _inner(equation)
    if name in CALLS:
        return _evaluate(inner, _consts(equation), given, taps, probes)

    def again(given: list[Any], probes: Mapping[Key, Probe]) -> list[Any]:
        return _evaluate(inner, (), given, taps, probes)

    again = jax.checkpoint(again, prevent_cse=equation.params["prevent_cse"], policy=equation.params["policy"])
    return again(given, probes)


def _tapped_product(equation: Any, right: bool) -> Any:
    def product(x: Array, kernel: Array) -> Array:
        operands = (x, kernel) if right else (kernel, x)
        result: Array = equation.primitive.bind(*operands, **equation.params)
        return result

    def untapped(x: Array, kernel: Array, probe: Probe) -> Array:
        return product(x, kernel)

    def forward(x: Array, kernel: Array, probe: Probe) -> Any:
        return product(x, kernel), (x, kernel)

    def backward(kept: Any, dy: Array) -> Any:
        x, kernel = kept
        (dx,) = jax.linear_transpose(lambda x: product(x, kernel), x)(dy)
        # the kernel's gradient is made of what the probe carries
        return dx, None, (x, dy)

    tapped = jax.custom_vjp(untapped)
    tapped.defvjp(forward, backward)
    return tapped


def _tapped_scan(equation: Any, given: list[Any], taps: Mapping[Key, Tap], probes: Mapping[Key, Probe]) -> list[Any]:
    params = equation.params
    consts, carried = params["num_consts"], params["num_carry"]
    inner = params["jaxpr"]

    def turn(carry: list[Any], rest: Any) -> tuple[list[Any], list[Any]]:
        slices, probes = rest
        outputs = _evaluate(inner.jaxpr, inner.consts, [*given[:consts], *carry, *slices], taps, probes)
        return outputs[:carried], outputs[carried:]

    carry, stacked = jax.lax.scan(
        turn,
        given[consts : consts + carried],
        (given[consts + carried :], dict(probes)),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked]


def _bind(equation: Any, given: list[Any]) -> list[Any]:
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*given, **equation.primitive.get_bind_params(equation.params))
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def _inner(equation: Any) -> Any:
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return getattr(inner, "jaxpr", inner)


def _consts(equation: Any) -> Sequence[Any]:
    return getattr(equation.params.get("jaxpr", equation.params.get("call_jaxpr")), "consts", ())


def _named(variables: Sequence[Any], views: Sequence[View | None]) -> dict[Any, View]:
    return {v: view for v, view in zip(variables, views, strict=False) if view is not None}


def zeros(tap: Tap, responses: int) -> Probe:
    x, y = (jnp.zeros((responses, *t.shape), t.dtype) for t in tap.probe)
    return x, y
