"""The parts by name, in order of importance, with the seconds that each may take of the whole."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.host_counts import counts
from benchmarks.gpu.isolated import Part
from benchmarks.gpu.laws import laws
from benchmarks.gpu.resolve_cost import resolving
from benchmarks.gpu.right_kernels import products as right_products
from benchmarks.gpu.right_updates import updates as right_updates
from benchmarks.gpu.update_cost import costs
from benchmarks.gpu.weight_cost import products
from benchmarks.gpu.whole_step import steps


@dataclass(frozen=True)
class Share:
    """A part, and its seconds of the `WHOLE`."""

    run: Part
    seconds: float


WHOLE = 285.0
PARTS = {
    "updates-right": Share(right_updates, 60),
    "kernels-right": Share(right_products, 30),
    "updates": Share(costs, 115),
    "counts": Share(counts, 25),
    "resolving": Share(resolving, 20),
    "products": Share(products, 20),
    "laws": Share(laws, 60),
    "whole-steps": Share(steps, 60),
}
