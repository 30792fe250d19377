"""Compiles the Triton kernels for GPUs that need not be there; prints what spills from registers, in bytes, as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pcr_torch.kernels import triton_weights


def spilled(capability: int, dtype: str, tiles: triton_weights.Tiles, **options: Any) -> int:
    """Bytes of a thread's stack."""
    kernel = triton_weights._kernel
    fixed = {"STREAMS": 2, "GATHER": False, "TRANSPOSED": False, "ADD": False, "WIDEN": False} | options
    fixed |= {"OUT": tiles.outputs, "IN": tiles.inputs, "ROWS": tiles.rows, "GROUP": 8, "PRECISION": tiles.precision}
    pointers = {"x_at": dtype, "a_at": dtype, "b_at": dtype, "p_at": "fp32", "s_at": "fp32", "found_at": "fp64"}
    signature, dense = {}, {}
    for k, name in enumerate(kernel.arg_names):
        held = pointers.get(name, "i32" if name.endswith("_at") else None)
        signature[name] = "constexpr" if name in fixed else "i32" if held is None else f"*{held}"
        if name in pointers or name.endswith("_stride") or name in ("inputs", "outputs"):
            dense[k,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=dense)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


def main() -> None:
    found = {}
    for rows, dtype in ((1024, torch.bfloat16), (128, torch.float16), (1024, torch.float32)):
        name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        for capability in (80, 90):
            tiles = triton_weights.tiles_for(rows, 1536, 8960, dtype)
            found[f"{name} sm_{capability}"] = spilled(capability, name, tiles)
    wide = triton_weights.tiles_for(1024, 1536, 8960, torch.bfloat16)
    found["bf16 sm_90 packed"] = spilled(90, "bf16", wide, GATHER=True, TRANSPOSED=True, ADD=True)
    found["bf16 sm_90 one stream"] = spilled(90, "bf16", wide, STREAMS=1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
