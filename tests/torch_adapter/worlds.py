"""Start a few processes that run one function as ranks of a gloo world, and hand back what each returned."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_LIBRARIES = ("torch.distributed.fsdp", "transformers.models.llama.modeling_llama")


def run_world(
    work: Callable[..., Any],
    folder: Path,
    *args: Any,
    world: int = 2,
    timeout: float = 100,
    libraries: Sequence[str] = (),
) -> list[Any]:
    """[work(rank, *args) for each rank], each in its own process; a rank's exception is raised with its traceback, and
    ranks that hang with where they stand.

    `work` must be importable by name from a module. Results travel through files in `folder`. The ranks are forked from
    a server process, which has no threads and imports `libraries` once for all of them.
    """
    multiprocessing.set_forkserver_preload([*_LIBRARIES, *libraries])  # of the first call, which starts the server
    context = mp.start_processes(
        _rank, args=(work, world, str(folder), timeout, args), nprocs=world, join=False, start_method="forkserver"
    )
    assert context is not None
    end = time.monotonic() + timeout
    try:
        while not context.join(timeout=1):
            if time.monotonic() > end:
                where = "\n\n".join((folder / f"stacks-{rank}.txt").read_text() for rank in range(world))
                raise TimeoutError(f"{work.__name__} did not finish on {world} ranks in {timeout} s:\n{where}")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, work: Callable[..., Any], world: int, folder: str, timeout: float, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    try:
        stacks = open(Path(folder) / f"stacks-{rank}.txt", "w")  # noqa: SIM115 - open as long as the process
        faulthandler.dump_traceback_later(timeout * 0.7, file=stacks)
        torch.save(work(rank, *args), Path(folder) / f"result-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
