"""Are both tiers right on this device? Against the loop over responses in float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pcr_core
from benchmarks.gpu.context import Context, Cut
from benchmarks.gpu.tables import Table
from benchmarks.gpu.tiny_models import EVEN, PADDED, UNEQUAL, Batch, autocast, configs, make, microbatches, missing
from pcr_core import BlockStatistics
from pcr_torch import PCR

FLOAT32, BF16 = 1e-4, 8e-2  # bounds on errors; of bf16 that of the forward pass, not of PCR
RULE = pcr_core.PCR(alpha=0.7)


@dataclass(frozen=True)
class How:
    """A way to take a step."""

    batch: Batch = EVEN
    weights: torch.dtype = torch.float32
    autocast: bool = False
    checkpointing: bool = False

    @property
    def bound(self) -> float:
        return BF16 if self.autocast or self.weights != torch.float32 else FLOAT32


HOW = {
    "float32": How(),
    "bf16 autocast": How(autocast=True),
    "bf16 weights": How(weights=torch.bfloat16),
    "checkpointing": How(checkpointing=True),
    "unequal groups, two microbatches": How(UNEQUAL),
    "padding": How(PADDED),
    "all of these": How(PADDED + UNEQUAL[1:], autocast=True, checkpointing=True),
}
TOY_HOW = {name: HOW[name] for name in ("float32", "unequal groups, two microbatches", "all of these")}
ROUTED = "Mixtral"


@dataclass(frozen=True)
class Found:
    """Of one step: gradients by name, and statistics of the blocks."""

    gradients: dict[str, Tensor]
    statistics: BlockStatistics[Tensor]
    path: str


def updates(context: Context) -> Iterator[Table]:
    """A row for each model and way, both tiers side by side; written row by row at the end or when time is up."""
    width = 32 if context.toy else 256
    table = Table(
        "Right? Largest relative errors against the loop in float64 on the CPU",
        ["model", "how", "without noise: gradients", "products", "with noise: gradients", "products", "noise", "bound",
         "right"],
        notes=["gradients: of every parameter; products: |P|^2, |S|^2, P.S of every block; noise: v_p, v_s, v_ps."],
    )  # fmt: skip
    for name in configs(width):
        if missing(name):
            table.notes.append(f"{name}: left out, since {missing(name)}.")
            continue
        context.say(f"right? {name}")
        model = make(name, width, context.seed)
        exact: dict[tuple[Batch, torch.dtype], Found] = {}
        for how, way in HOW.items() if not context.toy else TOY_HOW.items():
            if name == ROUTED and way.bound == BF16:
                continue
            if context.left() < 2:
                table.notes.append(f"Cut, since the time was up: from {name}, {how} on.")
                yield table
                return
            try:
                key = way.batch, way.weights
                if key not in exact:
                    exact[key] = _exact(model, way, context.seed)
                row, right = _errors(context, model, name, way, exact[key])
            except Exception as error:
                row, right = [f"{type(error).__name__}: {error}".splitlines()[0][:150], *[None] * 5], False
            table.rows.append([name, how, *row, right])
            table.wrong |= not right
    table.notes.append(f"{ROUTED}: in bf16 tokens may go to other experts; with noise it takes the loop itself.")
    yield table
    if not table.rows:
        raise Cut("no model was compared")


def _errors(context: Context, model: Any, name: str, way: How, exact: Found) -> tuple[list[Any], bool]:
    plain = _step(model, way, context.device, torch.float32, context.seed, noise_every=0)
    found: list[Any] = [_of_gradients(plain, exact), _of_products(plain, exact)]
    paths = plain.path == "autograd" and plain.statistics.plasticity_var is None
    if name == ROUTED:
        found += [None] * 3
    else:
        noisy = _step(model, way, context.device, torch.float32, context.seed, noise_every=1)
        found += [_of_gradients(noisy, exact), _of_products(noisy, exact), _of_noise(noisy, exact)]
        paths &= noisy.path == "fast"
    right = paths and all(error <= way.bound for error in found if error is not None)
    return [*found, way.bound], right


def _exact(model: Any, way: How, seed: int) -> Found:
    rounded = How(way.batch)  # in float64 from the weights as they are rounded
    wide = copy.deepcopy(model).to(way.weights).double()
    return _step(wide, rounded, "cpu", torch.float64, seed, norms="loop", noise_every=1)


def _step(model: Any, way: How, device: str, dtype: torch.dtype, seed: int, **options: Any) -> Found:
    mine = model
    if dtype != torch.float64:
        mine = copy.deepcopy(model).to(device, way.weights)
    if way.checkpointing:
        mine.gradient_checkpointing_enable({"use_reentrant": False})
    method = PCR(mine, rule=RULE, **options)
    for batch in microbatches(way.batch, seed, device, dtype):
        with autocast(device, way.autocast):
            logp = batch.logp(mine, dtype)
        method.accumulate_cotangents(logp, *batch.cotangents, group_ids=batch.groups)
    report = method.resolve()
    method.remove()
    gradients = {n: p.grad.double().cpu() for n, p in mine.named_parameters() if p.grad is not None}
    return Found(gradients, report.statistics, report.path)


def _of_gradients(found: Found, exact: Found) -> float:
    """Of a parameter's norm, or of a hundredth of the mean one's where that is larger."""
    if found.gradients.keys() != exact.gradients.keys():
        return float("inf")
    norms = {name: gradient.norm() for name, gradient in exact.gradients.items()}
    least = 1e-2 * torch.stack(list(norms.values())).square().mean().sqrt()
    return max(
        float((found.gradients[name] - gradient).norm() / torch.maximum(norms[name], least))
        for name, gradient in exact.gradients.items()
    )


def _of_products(found: Found, exact: Found) -> float:
    mine, true = found.statistics, exact.statistics
    scale = (true.plasticity_sq * true.stability_sq).sqrt()
    return _worst(
        (mine.plasticity_sq, true.plasticity_sq, true.plasticity_sq),
        (mine.stability_sq, true.stability_sq, true.stability_sq),
        (mine.dot, true.dot, scale),
    )


def _of_noise(found: Found, exact: Found) -> float:
    mine, true = found.statistics, exact.statistics
    if mine.plasticity_var is None or true.plasticity_var is None:
        return float("inf")
    scale = (true.plasticity_var * true.stability_var).sqrt()
    return _worst(
        (mine.plasticity_var, true.plasticity_var, true.plasticity_var),
        (mine.stability_var, true.stability_var, true.stability_var),
        (mine.covariance, true.covariance, scale),
    )


def _worst(*each: tuple[Any, Any, Any]) -> float:
    """Largest error of found, exact, in units of the third; NaN counts as infinite."""
    errors = torch.stack([((found - exact).abs() / scale).max() for found, exact, scale in each])
    return float(errors.nan_to_num(nan=float("inf")).max())
