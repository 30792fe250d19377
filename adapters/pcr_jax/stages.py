"""A traced function in two stages: what comes before certain inputs are read, and the rest.

Both streams go back through the second stage; below, where no block is, they are one. A model is cut by its own
equations, so that it needs no marks: everything up to the first block kernel is the first stage.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from pcr_jax.taps import CALLS, inline


@dataclass(frozen=True)
class Stages:
    """Two functions of flat inputs that make the whole.

    Attributes:
        lower: inputs -> (values of floating or complex type that the upper stage reads, the others).
        upper: (inputs, floating, others) -> outputs.
        read_above: indices of the inputs that the upper stage reads itself.
    """

    lower: Callable[[Sequence[Any]], tuple[list[Any], list[Any]]]
    upper: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], list[Any]]
    read_above: frozenset[int]


def split(function: Callable[..., Any], inputs: Sequence[Any], watched: Collection[int]) -> Stages:
    """Of `function(*inputs)`, a tuple or list of arrays, at the first equation that reads one of the watched inputs."""
    closed = jax.make_jaxpr(function)(*inputs)
    while True:
        jaxpr = closed.jaxpr
        marks = {jaxpr.invars[k] for k in watched}
        first = next((k for k, eqn in enumerate(jaxpr.eqns) if marks & _read(eqn)), 0)
        if not jaxpr.eqns or jaxpr.eqns[first].primitive.name not in CALLS:
            break
        # a model that is jitted as a whole is one equation: its body takes the place of it
        closed = jax.make_jaxpr(lambda *inputs, closed=closed: inline(closed, inputs))(*inputs)
    below, above = jaxpr.eqns[:first], jaxpr.eqns[first:]
    wanted = {v for eqn in above for v in _read(eqn)} | {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    made = [v for eqn in below for v in eqn.outvars if v in wanted]
    floating = [v for v in made if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    others = [v for v in made if not jnp.issubdtype(v.aval.dtype, jnp.inexact)]

    def stage(equations: list[Any], invars: list[Any], outvars: list[Any]) -> Callable[..., list[Any]]:
        names = jaxpr.debug_info.with_unknown_names()
        part = jaxpr.replace(eqns=equations, invars=invars, outvars=outvars, debug_info=names)
        function: Callable[..., list[Any]] = jaxpr_as_fun(ClosedJaxpr(part, closed.consts))
        return function

    lower_part = stage(below, jaxpr.invars, [*floating, *others])
    upper_part = stage(above, [*jaxpr.invars, *floating, *others], jaxpr.outvars)

    def lower(inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        values = lower_part(*inputs)
        return values[: len(floating)], values[len(floating) :]

    def upper(inputs: Sequence[Any], carried: Sequence[Any], rest: Sequence[Any]) -> list[Any]:
        return upper_part(*inputs, *carried, *rest)

    return Stages(lower, upper, frozenset(k for k, v in enumerate(jaxpr.invars) if v in wanted))


def _read(eqn: Any) -> set[Any]:
    return {v for v in eqn.invars if not isinstance(v, Literal)}
