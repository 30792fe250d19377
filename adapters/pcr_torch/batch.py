"""What a micro-batch must look like, and the strata of its responses."""

from __future__ import annotations

import torch
from torch import Tensor

from pcr_core.statistics import Strata


def check_batch(logp: Tensor, cotangents: tuple[Tensor, ...], group_ids: Tensor) -> Tensor:
    """The group ids as a tensor. Reads no value, so that an accelerator is not waited for."""
    if not isinstance(logp, Tensor) or logp.ndim != 2:
        raise ValueError(f"logp: expected a tensor (responses, tokens), got {getattr(logp, 'shape', type(logp))}")
    if not logp.requires_grad:
        raise ValueError(
            "logp: it has no graph; compute it with gradients enabled, from a model with trainable weights"
        )
    for cotangent in cotangents:
        if not isinstance(cotangent, Tensor):
            raise TypeError(f"cotangent: expected a torch tensor, got {type(cotangent).__name__}")
        if cotangent.shape != logp.shape:
            raise ValueError(f"cotangent: expected logp's shape {tuple(logp.shape)}, got {tuple(cotangent.shape)}")
        if cotangent.device != logp.device or cotangent.dtype != logp.dtype:
            raise ValueError(
                f"cotangent: expected {logp.dtype} on {logp.device} as logp, got {cotangent.dtype}, {cotangent.device}"
            )
    ids = torch.as_tensor(group_ids)
    if ids.dtype.is_floating_point or ids.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"group_ids: expected integers, got {ids.dtype}")
    if ids.shape != (logp.shape[0],):
        raise ValueError(f"group_ids: expected one id a response, shape ({logp.shape[0]},), got {tuple(ids.shape)}")
    return ids


def strata_of(group_ids: Tensor, strata: Strata) -> Tensor:
    """Stratum of each response, 0 to q - 1, on the CPU; ValueError where one has a single response."""
    ids = torch.zeros_like(group_ids) if strata == "batch" else group_ids
    _, index, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    if bool((counts < 2).any()):
        what = "micro-batch" if strata == "batch" else f"group {ids[index == int(counts.argmin())][0].item()}"
        raise ValueError(
            f"group_ids: {what} has one response, which carries no information on the variance. Give every prompt two "
            "or more responses in a micro-batch (a larger one, or whole groups in each), or ask for strata='batch'"
        )
    positions: Tensor = index
    return positions.cpu()
