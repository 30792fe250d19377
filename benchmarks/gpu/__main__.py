"""Is PCR right on this device, and what does it cost there? One command, under five minutes: `make gpu`.

Parts, in order: correctness of both tiers against the loop in float64 on the CPU; whole updates of three models against
plain backward passes; the kernels by themselves; the core's laws on the device. Results are printed as Markdown and
kept as JSON. Without an accelerator everything runs on the CPU at toy sizes, which says nothing of speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.gpu.bench import Bench, markdown
from benchmarks.gpu.correctness import correctness
from benchmarks.gpu.kernel_tables import products, resolving
from benchmarks.gpu.updates import updates


def laws(bench: Bench) -> None:
    """The conformance suite's built-in adapters on the device."""
    where = ["--device", "cuda:0"] if bench.device.type == "cuda" else []
    for adapter in ("torch", "cupy") if bench.device.type == "cuda" else ("torch",):
        command = [sys.executable, "-m", "pcr_conformance", "run", "--adapter", adapter, *where, "--examples", "20"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        bench.add("laws", adapter=adapter, passed=done.returncode == 0, said=last[0][:160] if last else "")


PARTS = {"correctness": correctness, "updates": updates, "products": products, "resolving": resolving, "laws": laws}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="in this order; all by default")
    parser.add_argument("--budget-seconds", type=float, default=280, help="no part begins after that")
    parser.add_argument("--toy", action="store_true", help="small sizes, on the CPU too")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.md and gpu.json")
    args = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    bench = Bench(
        device, args.toy or device.type == "cpu", time.perf_counter() + args.budget_seconds, Console(width=200)
    )
    if device.type == "cpu":
        bench.console.print("There is no accelerator: toy sizes on the CPU, which say nothing of speed.")
    for name in args.parts:
        try:
            if bench.late:
                bench.add(name, left_out="no time left")
            else:
                PARTS[name](bench)
        except Exception as error:  # the other parts are worth having
            bench.add(name, failed=f"{type(error).__name__}: {str(error)[:200]}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.md").write_text(markdown(bench), encoding="utf-8")
    (args.out / "gpu.json").write_text(json.dumps(bench.tables, indent=2) + "\n", encoding="utf-8")
    print(markdown(bench))
    failed = [row for rows in bench.tables.values() for row in rows if "failed" in row or row.get("right") is False]
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
