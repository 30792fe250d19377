"""One law against one adapter: drawn, shrunk, and the outcome kept with how near it came to its bounds."""

from __future__ import annotations

import fnmatch
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pcr_conformance.adapter import Adapter
from pcr_conformance.drawing import Draw
from pcr_conformance.laws.checks import collect
from pcr_conformance.registry import LAWS, Law
from pcr_conformance.shrink import shrunk


@dataclass(frozen=True)
class Xfail:
    """A failure that is known: patterns of an adapter's and a law's name, and why it fails."""

    adapter: str
    law: str
    reason: str

    def matches(self, adapter: str, law: str) -> bool:
        return fnmatch.fnmatchcase(adapter, self.adapter) and fnmatch.fnmatchcase(law, self.law)


@dataclass(frozen=True)
class Verdict:
    """What became of a law; `outcome` is passed, failed, xfailed, xpassed (a failure too) or skipped."""

    adapter: str
    law: str
    level: str
    mode: str
    device: str
    outcome: str
    examples: int = 0
    seconds: float = 0.0
    worst: dict[str, float] = field(default_factory=dict)  # by dtype: largest error / bound
    message: str = ""
    software: str = ""  # what the adapter computes with, its version, and the name of an accelerator
    nearest: dict[str, str] = field(default_factory=dict)  # by dtype: the number that came nearest to its bound

    @property
    def bad(self) -> bool:
        return self.outcome in ("failed", "xpassed")


def read_xfails(path: Path) -> list[Xfail]:
    """The `[[xfail]]` tables of a TOML file; ValueError where one lacks adapter, law or a reason."""
    found = []
    content = tomllib.loads(path.read_text())
    for number, entry in enumerate(content.get("xfail", []), 1):
        for key in ("adapter", "law", "reason"):
            if not str(entry.get(key, "")).strip():
                raise ValueError(f"{path}: xfail {number} needs a {key}")
        found.append(Xfail(entry["adapter"], entry["law"], entry["reason"]))
    unknown = set(content) - {"xfail"}
    if unknown:
        raise ValueError(f"{path}: unknown keys {sorted(unknown)}; expected [[xfail]] tables")
    return found


def check_matched(xfails: Sequence[Xfail], adapters: Sequence[Adapter]) -> None:
    """ValueError naming the first entry that no law of any adapter answers to."""
    pairs = [(a.name, law.name) for a in adapters for law in LAWS if law.applies(a) is None]
    for entry in xfails:
        if not any(entry.matches(*pair) for pair in pairs):
            raise ValueError(f"xfail entry matches nothing: adapter {entry.adapter!r}, law {entry.law!r}")


def check(
    law: Law,
    adapter: Adapter,
    examples: int,
    seed: int,
    seen: Callable[[str], None] | None = None,
    *,
    shrink: bool = True,
) -> None:
    """Try the law on random cases; raises what the law or the adapter raises, with the shrunk input in its notes."""
    for index in range(max(1, round(examples * law.share))):
        arguments = law.draw(Draw(law.name, seed, index), adapter)
        if seen is not None:
            seen(str(arguments.get("dtype", "")))
        try:
            with np.errstate(all="ignore"):  # numbers that leave the range are part of what is tried
                law.check(adapter, **arguments)
        except Exception as error:
            if not shrink:
                raise
            raise _smallest(law, adapter, arguments, error) from error


def _smallest(law: Law, adapter: Adapter, arguments: dict[str, Any], first: Exception) -> Exception:
    """The error that the smallest input found raises, of the same kind as the first, and that input as a note."""
    found = first

    def fails(candidate: dict[str, Any]) -> bool:
        nonlocal found
        try:
            with np.errstate(all="ignore"):
                law.check(adapter, **candidate)
        except Exception as error:
            if type(error) is type(first):
                found = error
                return True
        return False

    with collect():  # bounds of cases that are made on the way are not the run's
        smallest = shrunk(arguments, fails)
    found.add_note("\n".join(f"{name} = {value!r}" for name, value in smallest.items()))
    return found


def _where(error: Exception) -> str:
    """The way into a crash, innermost last; a law's own assertion says what was wrong by itself."""
    if isinstance(error, AssertionError):
        return ""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return "".join(f"  at {Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}\n" for f in frames)


def judge(
    law: Law, adapter: Adapter, examples: int, seed: int, xfails: Sequence[Xfail] = (), *, shrink: bool = True
) -> Verdict:
    """`check` as a record; a crash inside the adapter is a failed law like any other."""
    special = [what for what in ("sharded", "in_place") if what in adapter.capabilities]
    mode = special[0].replace("_", " ") if special else "jit" if adapter.compiled else "eager"
    common = (adapter.name, law.name, law.level, mode, adapter.device)
    software = getattr(adapter, "software", "")  # adapters of others need not say
    reason = law.applies(adapter)
    if reason is not None:
        return Verdict(*common, outcome="skipped", message=reason, software=software)
    expected = next((x for x in xfails if x.matches(adapter.name, law.name)), None)
    began, count, message = time.perf_counter(), 0, ""
    with collect() as worst:

        def seen(dtype: str) -> None:
            nonlocal count
            count += 1
            worst.dtype = dtype or "all"

        try:
            check(law, adapter, examples, seed, seen, shrink=shrink)
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", ()))
            message = (
                f"{type(error).__name__}: {error}\n{_where(error)}{notes}\nAgain: --seed {seed} --examples {examples}"
            )
    outcome = ("failed" if message else "passed") if expected is None else ("xfailed" if message else "xpassed")
    if expected is not None:
        message = f"{expected.reason}\n{message}".strip()
    return Verdict(
        *common,
        outcome,
        count,
        time.perf_counter() - began,
        dict(worst.ratios),
        message,
        software,
        nearest=dict(worst.numbers),
    )


def judge_all(adapters: Sequence[Adapter], examples: int, seed: int, xfails: Sequence[Xfail] = ()) -> Iterator[Verdict]:
    """Every law on every adapter, whatever fails on the way."""
    check_matched(xfails, adapters)
    for adapter in adapters:
        for law in LAWS:
            yield judge(law, adapter, examples, seed, xfails)
