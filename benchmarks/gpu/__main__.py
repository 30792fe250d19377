"""Is PCR right on this device, and what does it cost there? In under five minutes.

Correctness first, then the tables of updates, kernels, laws and, where TRL is installed, whole steps. Each part runs in
a process of its own and within its share of the time; what is cut or fails is said. Tables are printed as they come,
and written as Markdown and JSON. Without an accelerator all of it runs at toy sizes on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # imports that ask for devices leave them untouched
ROOT = Path(__file__).parents[2]
for name, folder in (("pcr_torch", "adapters"), ("pcr_conformance", "conformance")):
    if find_spec(name) is None:  # from a clone that is not installed
        sys.path.append(str(ROOT / folder))

from benchmarks.gpu import isolated  # noqa: E402
from benchmarks.gpu.context import Context  # noqa: E402
from benchmarks.gpu.machine import devices  # noqa: E402
from benchmarks.gpu.parts import PARTS, WHOLE  # noqa: E402
from benchmarks.gpu.tables import Table  # noqa: E402

_LEAST = 3.0  # seconds with which a part is worth beginning


@dataclass
class Outcome:
    """Of one part."""

    part: str
    tables: list[Table]
    said: str = ""
    failed: bool = False
    seconds: float = 0.0

    @property
    def wrong(self) -> bool:
        return self.failed or any(table.wrong for table in self.tables)

    def markdown(self) -> str:
        parts = [table.markdown() for table in self.tables]
        if self.said:
            parts.append(f"**{self.part}: {'failed, ' if self.failed else ''}{self.said}**\n")
        return "\n".join(parts)


@dataclass
class Run:
    """All of it so far."""

    heading: str
    options: dict[str, Any]
    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome, out: Path) -> None:
        """Print it, and write all again."""
        self.outcomes.append(outcome)
        print(outcome.markdown(), flush=True)
        out.mkdir(parents=True, exist_ok=True)
        text = "\n".join([f"## {self.heading}\n", *(each.markdown() for each in self.outcomes)])
        (out / "gpu.md").write_text(text, encoding="utf-8")
        parts = {
            each.part: {
                "seconds": round(each.seconds, 1),
                "failed": each.failed,
                "said": each.said,
                "tables": [table.record() for table in each.tables],
            }
            for each in self.outcomes
        }
        record = {"heading": self.heading, "date": str(date.today()), **self.options, "parts": parts}
        (out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--budget-seconds", type=float, default=WHOLE, help="of all parts together")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.md and gpu.json")
    parser.add_argument("--toy", action="store_true", help="toy sizes on an accelerator too")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    args = parser.parse_args()
    began = time.monotonic()
    end = began + args.budget_seconds

    beginning, start = Context("cpu", True, args.seed, began, began + 60), "fork"
    found = _run("machine", devices, beginning, start)
    if found.failed:
        start = "spawn"
        found = _run("machine", devices, beginning, start)
    facts = {row[0]: row[1] for table in found.tables for row in table.rows}
    device = facts.get("device", "cpu")
    toy = args.toy or device == "cpu"
    what = facts.get("card") or f"{facts.get('processor', 'CPU')}, no accelerator: toy sizes"
    run = Run(f"{date.today()}, {what}", {"seed": args.seed, "toy": toy, "budget_seconds": args.budget_seconds})
    run.add(found, args.out)
    for name in args.parts:
        share = PARTS[name].seconds * args.budget_seconds / WHOLE
        now = time.monotonic()
        if end - now < _LEAST:
            run.add(Outcome(name, [], "cut: no time was left for it"), args.out)
            continue
        context = Context(device, toy, args.seed, began, min(end, now + share))
        run.add(_run(name, PARTS[name].run, context, start), args.out)
    wrong = [each.part for each in run.outcomes if each.wrong]
    print(f"{'Wrong or failed: ' + ', '.join(wrong) if wrong else 'All that ran is right'}, "
          f"{time.monotonic() - began:.0f} s; {args.out}/gpu.md, gpu.json")  # fmt: skip
    raise SystemExit(1 if wrong else 0)


def _run(name: str, part: isolated.Part, context: Context, start: str) -> Outcome:
    began = time.monotonic()
    tables, said, failed = isolated.run(part, context, start)
    return Outcome(name, tables, said, failed, time.monotonic() - began)


if __name__ == "__main__":
    main()
