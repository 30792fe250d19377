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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pcr_torch.kernels import triton_pairs, triton_weights


def spilled(
    capability: int,
    kernel: Any,
    fixed: dict[str, Any],
    pointers: dict[str, str],
    dense: tuple[str, ...],
    **options: int,
) -> int:
    """Bytes of a thread's stack.

    Args:
        capability: of the GPU, 90 for 9.0.
        kernel: decorated by triton.jit.
        fixed: arguments known when it is compiled.
        pointers: dtypes of arguments that are addresses; the others are integers.
        dense: which arguments are multiples of 16.
        options: warps and stages.
    """
    signature = {
        name: "constexpr" if name in fixed else f"*{pointers[name]}" if name in pointers else "i32"
        for name in kernel.arg_names
    }
    attributes = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(kernel.arg_names) if name in dense}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


def weights(capability: int, dtype: str, tiles: triton_weights.Tiles, **options: Any) -> int:
    fixed = {"STREAMS": 2, "GATHER": False, "TRANSPOSED": False, "ADD": False, "WIDEN": False} | options
    fixed |= {"OUT": tiles.outputs, "IN": tiles.inputs, "ROWS": tiles.rows, "GROUP": 8, "PRECISION": tiles.precision}
    totals = {"p_at": "fp32", "s_at": "fp32", "found_at": "fp64"}
    places = dict.fromkeys(("rows_at", "starts_at", "ends_at", "responses_at", "bounds_at"), "i32")
    pointers = {"x_at": dtype, "a_at": dtype, "b_at": dtype} | totals
    dense = (*pointers, "x_stride", "a_stride", "b_stride", "inputs", "outputs")
    kernel = triton_weights._kernel
    return spilled(capability, kernel, fixed, pointers | places, dense, num_warps=tiles.warps, num_stages=tiles.stages)


def totals(capability: int, kernel: Any, **fixed: Any) -> int:
    form = {"BLOCK": triton_pairs._BLOCK, "BLOCKS": triton_pairs._BLOCKS, "ALIGNED": True, "FIRST": tl.float32}
    pointers = {"table_at": "i64", "found_at": "fp64", "weights_at": "fp32", "broken_at": "i32"}
    return spilled(
        capability, kernel, form | {"SECOND": tl.float32} | fixed, pointers, (), num_warps=triton_pairs._WARPS
    )


def main() -> None:
    found = {}
    for rows, dtype in ((1024, torch.bfloat16), (128, torch.float16), (1024, torch.float32)):
        name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        for capability in (80, 90):
            tiles = triton_weights.tiles_for(rows, 1536, 8960, dtype)
            found[f"{name} sm_{capability}"] = weights(capability, name, tiles)
    wide = triton_weights.tiles_for(1024, 1536, 8960, torch.bfloat16)
    found["bf16 sm_90 packed"] = weights(90, "bf16", wide, GATHER=True, TRANSPOSED=True, ADD=True)
    found["bf16 sm_90 one stream"] = weights(90, "bf16", wide, STREAMS=1)
    for capability in (80, 90):
        found[f"products sm_{capability}"] = totals(capability, triton_pairs._products, JOINED=0)
        found[f"combine sm_{capability}"] = totals(capability, triton_pairs._combine, OUT=tl.bfloat16)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
