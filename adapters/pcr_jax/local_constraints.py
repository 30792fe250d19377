"""A model that tells XLA how its activations lie on a mesh, made to run on one data shard.

`make_train_step(shardings=...)` pulls back each data shard in a `shard_map` over the data axes. There the model's own
`with_sharding_constraint` may name the other axes only. So the model is traced, and the data axes are taken out of
every constraint in the traced program: a data shard holds its rows whole.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jax.sharding import AxisType, NamedSharding

from pcr_jax.pullback import LogpFn
from pcr_jax.sharding import Layout, without

_MAP = (
    "its own shard_map may map over the other axes only, by the mesh of the context: leave mesh= out, name axis_names, "
    "and call the step under jax.set_mesh(mesh)"
)
_HINTS = {  # by words of JAX's error
    "can only refer to Auto axes": "its sharding constraints over these axes have to be NamedSharding(mesh, spec), of "
    "which they are left out; a bare PartitionSpec may name the other axes only",
    "should match the mesh passed to shard_map": _MAP,
    "axis sizes that are not evenly divisible": _MAP,
}


def on_a_shard(logp_fn: LogpFn, layout: Layout | None) -> LogpFn:
    """The same function for use inside `Layout.by_shard`.

    Meshes of explicit axes, whose shardings are part of an array's type, are left as they are.
    """
    if layout is None or not layout.data or AxisType.Explicit in layout.mesh.axis_types:
        return logp_fn

    def local(params: Any, rows: Any) -> Any:
        flat, structure = jax.tree.flatten((params, rows))
        try:
            closed, shape = jax.make_jaxpr(
                lambda *flat: logp_fn(*jax.tree.unflatten(structure, flat)), return_shape=True
            )(*flat)
        except ValueError as error:
            hint = next((hint for words, hint in _HINTS.items() if words in str(error)), None)
            if hint is None:
                raise
            raise ValueError(
                f"logp_fn runs on one data shard, inside a shard_map over {layout.data}: {hint}"
            ) from error
        outputs = jaxpr_as_fun(ClosedJaxpr(_rewritten(closed.jaxpr, layout), closed.consts))(*flat)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return local


def _rewritten(jaxpr: Any, layout: Layout) -> Any:
    inside, equations = jax.sharding.get_abstract_mesh(), []
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, dict(equation.params)
        if name == "sharding_constraint" and isinstance(params["sharding"], NamedSharding):
            spec = without(params["sharding"].spec, layout.data)
            params["sharding"], params["context_mesh"] = NamedSharding(inside, spec), inside
        else:
            params = {key: _within(value, layout) for key, value in params.items()}
        equations.append(equation.replace(params=params))
    return jaxpr.replace(eqns=equations)


def _within(value: Any, layout: Layout) -> Any:
    """A parameter of an equation, with the programs that it may hold."""
    if isinstance(value, ClosedJaxpr):
        return ClosedJaxpr(_rewritten(value.jaxpr, layout), value.consts)
    if isinstance(value, Jaxpr):
        return _rewritten(value, layout)
    if isinstance(value, tuple) and any(isinstance(one, (ClosedJaxpr, Jaxpr)) for one in value):
        return tuple(_within(one, layout) for one in value)
    return value
