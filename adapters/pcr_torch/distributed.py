"""Several processes: which ranks share gradients, and the few collectives that PCR needs of them.

Everything follows DDP and FSDP: a gradient is the mean over data-parallel ranks of what each contributes. Replicated
totals are averaged once a step, in buckets. Sharded totals are reduce-scattered where they arise, one weight at a time,
and kept as the rank's plain local shard; only what is handed out (`.grad`, states) is a DTensor again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

BUCKET_BYTES = 25_000_000


@dataclass(frozen=True)
class Ranks:
    """The ranks over which gradients are averaged.

    Attributes:
        groups: summing over each in turn sums over all ranks; two for hybrid sharding.
        device: where they communicate.
        sharded: whether each rank holds a part of every parameter, or the whole.
    """

    groups: tuple[dist.ProcessGroup, ...]
    device: torch.device
    sharded: bool = False

    @property
    def world(self) -> int:
        return math.prod(group.size() for group in self.groups)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks of a small CPU tensor: one all-reduce a group, the same bits on every rank."""
        there = values.to(self.device, copy=True)
        for group in self.groups:
            dist.all_reduce(there, group=group)
        return there.to(values.device)

    def share(self, k: int, parameter: Tensor) -> float:
        """What part of this rank's inner products of parameter k counts, so that the sum over ranks is right.

        Of a sharded parameter: that of its shard, over the number of ranks that hold the same. Of a replicated one: all
        or nothing, as each rank takes its turn.
        """
        if isinstance(parameter, DTensor):
            sizes = parameter.device_mesh.shape
            copies = math.prod(n for n, p in zip(sizes, parameter.placements) if isinstance(p, Replicate))
            return 1 / copies
        return float(k % self.world == self.groups[0].rank())


def unwrap(model: nn.Module, process_group: dist.ProcessGroup | None) -> tuple[nn.Module, Ranks | None]:
    """The module whose parameters are meant, and its ranks; None for a model that is on one process alone.

    Compiled wrappers are looked through.

    Raises:
        ValueError: a wrapper that is not supported, with the reason.
    """
    model = uncompiled(model)
    if isinstance(model, nn.DataParallel):
        raise ValueError("model: DataParallel copies the model within one process; use DistributedDataParallel")
    if isinstance(model, DistributedDataParallel):
        _refuse_ddp(model)
        _refuse_second_group(process_group, "DistributedDataParallel")
        return uncompiled(model.module), Ranks((model.process_group,), next(model.parameters()).device)
    modules = list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise ValueError(
            "model: FullyShardedDataParallel (FSDP1) flattens the weights of a module into one, which hides them from "
            "PCR; shard with torch.distributed.fsdp.fully_shard (fsdp_version: 2 in accelerate)"
        )
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sharded = {name: p for name, p in trainable.items() if isinstance(p, DTensor)}
    if sharded:
        _refuse_second_group(process_group, "a sharded model")
        if not any(isinstance(module, FSDPModule) for module in modules):
            raise ValueError("model: its parameters are DTensors without fully_shard; tensor parallel is not supported")
        return model, _mesh_ranks(sharded)
    if process_group is not None:
        return model, Ranks((process_group,), next(model.parameters()).device)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"model: it is not wrapped, but a process group of {dist.get_world_size()} ranks is initialised. Wrap it "
            "in DistributedDataParallel or fully_shard first, then make PCR of that; or give process_group=, the ranks "
            "with copies of this model, and PCR averages over them itself"
        )
    return model, None


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile, or accelerate by regions, has made another of."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def local(tensor: Tensor) -> Tensor:
    """The plain tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """The inverse of `local`, with the parameter's mesh and placements."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def split(value: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor, or of one that is split like the parameter; ValueError for another split."""
    mesh, placements = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else (None, None)
    if isinstance(value, DTensor):
        if value.device_mesh != mesh or value.placements != placements:
            raise ValueError(
                "state: its tensors are not sharded as this model; give whole ones (DTensor.full_tensor())"
            )
        return value.to_local()
    if mesh is None:
        return value
    return distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None).to_local()


def reduce_scatter(total: Tensor, parameter: Tensor) -> Tensor:
    """This rank's shard of the mean over ranks of a whole gradient, which is overwritten; a collective call."""
    if not isinstance(parameter, DTensor):
        return total
    mesh = parameter.device_mesh
    whole = DTensor.from_local(total.div_(mesh.size()), mesh, [Partial()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=parameter.placements).to_local().to(parameter.to_local().device)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def kept_whole(modules: Sequence[FSDPModule]) -> Iterator[None]:
    """During a backward pass that another follows: weights that FSDP holds whole before it are whole after it.

    FSDP gathers for a pass what it saw go through a module's forward. A head that a fused kernel reads (as in TRL) was
    gathered by hand, and would be missing in the second pass. What is whole now takes no more memory than it did.
    """
    whole = [module for module in modules if _is_whole(cast(nn.Module, module))]
    for module in whole:
        module.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for module in whole:
            module.set_reshard_after_backward(True, recurse=False)


def _is_whole(module: nn.Module) -> bool:
    """Whether the module, but for modules that are sharded by themselves, has its parameters gathered."""
    if any(not isinstance(p, DTensor) for p in module.parameters(recurse=False)):
        return True
    return any(_is_whole(child) for child in module.children() if not isinstance(child, FSDPModule))


def average(tensors: Iterable[Tensor], ranks: Ranks) -> None:
    """Mean over ranks, in place. Small tensors share flat buffers; large ones are reduced where they are."""
    for bucket in _buckets(tensors):
        alone = len(bucket) == 1 and bucket[0].is_contiguous()
        flat = bucket[0].view(-1) if alone else torch.cat([tensor.reshape(-1) for tensor in bucket])
        flat.div_(ranks.world)  # before the sum, as DDP does: a sum of float16 could overflow
        for group in ranks.groups:
            dist.all_reduce(flat, group=group)
        if not alone:
            for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type and device together, up to BUCKET_BYTES; larger ones by themselves."""
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        bucket, size = filling.get(kind, ([], 0))
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        filling[kind] = (bucket, size + tensor.nbytes)
    for bucket, _ in filling.values():
        yield bucket


def _mesh_ranks(sharded: Mapping[str, DTensor]) -> Ranks:
    first = next(iter(sharded))
    mesh = sharded[first].device_mesh
    for name, parameter in sharded.items():
        if parameter.device_mesh != mesh:
            raise ValueError(f"model: {first} and {name} lie on different device meshes, which is not supported")
        placements = parameter.placements
        if not (isinstance(placements[-1], Shard) and all(isinstance(p, Replicate) for p in placements[:-1])):
            raise ValueError(
                f"model: {name} is placed as {placements}; tensor parallel, alone or with fully_shard, is not supported"
            )
    return Ranks(tuple(mesh.get_all_groups()), torch.device(mesh.device_type), sharded=True)


def _refuse_ddp(model: DistributedDataParallel) -> None:
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError("model: DistributedDataParallel around sharded parameters; use fully_shard on a 2-d mesh")
    if model.static_graph:
        raise ValueError("model: static_graph=True makes DDP reduce the first backward pass by itself; leave it out")
    if model.mixed_precision is not None:
        raise ValueError("model: DDP's mixed_precision casts weights behind the probes; use autocast or bf16 weights")
    if model.device_ids is not None and len(model.device_ids) > 1:
        raise ValueError("model: DistributedDataParallel on several devices a process; start a process for each")


def _refuse_second_group(process_group: dist.ProcessGroup | None, what: str) -> None:
    if process_group is not None:
        raise ValueError(f"process_group: {what} brings its own; give it for plain copies of a model only")
