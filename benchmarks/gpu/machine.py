"""What the numbers are measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.tables import Table
from benchmarks.measure import machine as processor
from pcr_torch import kernels


def devices(context: Context) -> Iterator[Table]:
    """The device that is there, as the first row, and versions."""
    if torch.cuda._is_in_bad_fork():
        raise RuntimeError("an import has touched the device before this process was forked")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = Table("Machine", ["what", "which"], [["device", device]])
    if device == "cuda":
        what = torch.cuda.get_device_properties(0)
        memory = f"{what.total_memory / 2**30:.0f} GiB, {what.multi_processor_count} multiprocessors"
        table.rows += [["card", what.name], ["its memory", memory], ["of such", str(torch.cuda.device_count())]]
        table.rows += [["products of gradients", kernels.chosen(torch.device("cuda", 0))]]
        table.rows += [["CUDA, ROCm", f"{torch.version.cuda}, {torch.version.hip}"]]
    else:
        table.rows += [["processor", processor("cpu")]]
        table.notes.append("No accelerator was found: the sizes are toys, and the times say nothing about one.")
    table.rows += [["CPU cores", str(len(os.sched_getaffinity(0)))], ["Python", platform.python_version()]]
    for package in ("torch", "triton", "transformers", "trl", "peft", "jax", "cupy"):
        try:
            table.rows.append([package, version(package)])
        except PackageNotFoundError:
            table.rows.append([package, "not installed"])
    yield table
