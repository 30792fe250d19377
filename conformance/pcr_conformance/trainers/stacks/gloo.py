"""A few processes that stay, and run one function after the other as ranks of a gloo world."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120.0


def on_ranks(work: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """[work(rank, *args) for each rank], each in a process of its own; arguments and results go through pickle.

    The processes are started by the first call and serve later ones, which saves their imports.

    Raises:
        RuntimeError: what a rank raised, with its traceback, or ranks that did not answer in two minutes.
    """
    return _world(world).call(work, *args)


@cache
def _world(size: int) -> _World:
    return _World(size)


class _World:
    def __init__(self, size: int) -> None:
        self._size, self._folder = size, tempfile.TemporaryDirectory(prefix="pcr-gloo-")
        atexit.register(self._end)
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        rendezvous = tempfile.mktemp(dir=self._folder.name)
        self._pipes, self._processes = [], []
        for rank in range(self._size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._size, rendezvous, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def call(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        if not all(process.is_alive() for process in self._processes):
            self._start()
        for pipe in self._pipes:
            pipe.send((work, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                answered = pipe.poll(TIMEOUT)
                answers.append(pipe.recv() if answered else (False, f"no answer in {TIMEOUT:.0f} s"))
            except EOFError:
                answers.append((False, "it has ended"))
            if not answers[-1][0]:  # the other ranks may wait for this one for ever
                self._kill()
                raise RuntimeError(f"rank {rank} of {self._size}: {answers[-1][1]}")
        return [result for _, result in answers]

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _end(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # upon which a rank ends
        for process in self._processes:
            process.join(5)
        self._kill()
        self._folder.cleanup()


def _serve(rank: int, world: int, rendezvous: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while True:
        try:
            work, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, work(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
