"""`pcr_core` itself as an adapter, on dense arrays of any library: what all libraries share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import numpy as np

import pcr_core
from pcr_conformance.adapter import Defaults, Resolved
from pcr_conformance.cases import Case, ObjectiveCase
from pcr_core import BlockStatistics, Objective, Rule, Weights

Function = Callable[..., tuple[Any, ...]]


def flat(record: Any) -> tuple[Any, ...]:
    """Fields of a record in order; compiled functions return tuples, which every tracer understands."""
    return tuple(getattr(record, f.name) for f in fields(record))


def resolve_flat(arrays: tuple[Any, ...], rule: Rule, sizes: tuple[int, ...], strata: Any) -> tuple[Any, ...]:
    p, s, ids, stability_ids = arrays
    res = pcr_core.resolve(
        p, s, group_ids=ids, stability_group_ids=stability_ids, rule=rule, sizes=sizes, strata=strata
    )
    return res.update, *flat(res.weights), *flat(res.statistics)


def statistics_flat(arrays: tuple[Any, ...], sizes: tuple[int, ...], strata: Any) -> tuple[Any, ...]:
    p, s, ids, stability_ids = arrays
    return flat(
        pcr_core.contribution_statistics(
            p, s, group_ids=ids, stability_group_ids=stability_ids, sizes=sizes, strata=strata
        )
    )


def weights_flat(arrays: tuple[Any, ...], rule: Rule) -> tuple[Any, ...]:
    return flat(rule(BlockStatistics(*arrays)))


def objective_flat(arrays: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> tuple[Any, ...]:
    return flat(pcr_core.grpo_objective(*arrays, **dict(options)))


class DenseAdapter(Defaults):
    """Eager NumPy; a library overrides the conversions, `run` (to compile) and `autodiff`."""

    name = "numpy"
    dtypes: tuple[str, ...] = ("float64", "float32", "float16")
    capabilities: frozenset[str] = frozenset({"objective"})

    def from_numpy(self, x: Any, dtype: str) -> Any:
        return np.asarray(x).astype({"int": "int64"}.get(dtype, dtype))

    def to_numpy(self, x: Any) -> Any:
        array = np.asarray(x)
        return array.astype(np.float64) if array.dtype != np.bool_ else array

    def scope(self) -> AbstractContextManager[Any]:
        """Settings of the library that hold while it runs."""
        return nullcontext()

    def run(self, function: Function, arrays: tuple[Any, ...], *static: Any) -> tuple[Any, ...]:
        """Call `function(arrays, *static)`; `static` is hashable and may be compiled in."""
        return function(arrays, *static)

    def dtype_of(self, x: Any) -> str:
        return str(x.dtype).rsplit(".", 1)[-1]

    def device_of(self, x: Any) -> str:
        return "cpu"

    def _streams(self, case: Case, dtype: str) -> tuple[Any, ...]:
        other = case.stability_group_ids
        return (
            self.from_numpy(case.plasticity, dtype),
            self.from_numpy(case.stability, dtype),
            self.from_numpy(case.group_ids, "int"),
            None if other is None else self.from_numpy(other, "int"),
        )

    def _tokens(self, case: ObjectiveCase, dtype: str) -> tuple[Any, ...]:
        arrays = (case.logp, case.logp_old, case.logp_ref, case.advantages)
        return (*(self.from_numpy(x, dtype) for x in arrays), self.from_numpy(case.mask, "bool"))

    def resolve(self, case: Case, rule: Rule, dtype: str) -> Resolved:
        with self.scope():
            update, *rest = self.run(resolve_flat, self._streams(case, dtype), rule, case.sizes, case.strata)
            arrays = [self.to_numpy(x) for x in rest]
            split = len(fields(Weights))
            return Resolved(
                self.to_numpy(update),
                Weights(*arrays[:split]),
                BlockStatistics(*arrays[split:]),
                self.dtype_of(update),
                self.device_of(update),
            )

    def statistics(self, case: Case, dtype: str) -> BlockStatistics[Any]:
        with self.scope():
            out = self.run(statistics_flat, self._streams(case, dtype), case.sizes, case.strata)
            return BlockStatistics(*(self.to_numpy(x) for x in out))

    def weights(self, statistics: BlockStatistics[Any], rule: Rule) -> Weights[Any]:
        with self.scope():
            arrays = tuple(self.from_numpy(x, self.accumulator) for x in flat(statistics))
            return Weights(*(self.to_numpy(x) for x in self.run(weights_flat, arrays, rule)))

    def objective(self, case: ObjectiveCase, dtype: str) -> Objective[Any]:
        with self.scope():
            out = self.run(objective_flat, self._tokens(case, dtype), tuple(case.options().items()))
            return Objective(*(self.to_numpy(x) for x in out))
