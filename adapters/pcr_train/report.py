"""The table at the end: what the model gained on the task and what it kept."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from pcr_train.evaluate import Interval, bootstrap, exact_binomial
from pcr_train.settings import Settings

if TYPE_CHECKING:
    from pcr_train.run import Outcome


def table(outcome: Outcome, settings: Settings) -> Table:
    """Before and after, with 95 % intervals: exact for proportions, bootstrap over problems for means."""
    before, after = outcome.before, outcome.after
    held = f"{len(before.heldout)} held-out problems; 95 % intervals in brackets"
    out = Table(title=held, title_style="dim", title_justify="right", box=None, pad_edge=False)
    for name, side in ((settings.task, "left"), ("before", "right"), ("after", "right"), ("change", "right")):
        out.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    reward = (before.reward, after.reward)
    out.add_row(
        "mean reward, sampled",
        *(_interval(bootstrap(x)) for x in reward),
        _interval(bootstrap((np.asarray(reward[1]) - np.asarray(reward[0])).tolist()), "+.2f"),
    )
    out.add_row("solved, greedy", *_solved(before.heldout, after.heldout))
    kept = [now for was, now in zip(before.heldout, after.heldout, strict=True) if was]
    out.add_row("  of those solved before", *_kept(kept))
    if after.retention:
        out.add_row(f"{outcome.retention_task} solved before", *_kept(after.retention))
    change = after.text - before.text
    out.add_row("fixed text, nats a token", f"{before.text:.3f}", f"{after.text:.3f}", f"{change:+.3f}")
    return out


def peak_memory() -> float:
    """Largest resident size of this process so far, in GB; nan where the system does not tell."""
    try:
        import resource
    except ImportError:
        return float("nan")
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (1e9 if sys.platform == "darwin" else 1e6)


def _solved(before: list[bool], after: list[bool]) -> tuple[str, str, str]:
    shown = [_interval(exact_binomial(sum(x), len(x))) for x in (before, after)]
    gained = sum(now and not was for was, now in zip(before, after, strict=True))
    lost = sum(was and not now for was, now in zip(before, after, strict=True))
    return shown[0], shown[1], f"+{gained} -{lost} of {len(before)}"


def _kept(kept: list[bool]) -> tuple[str, str, str]:
    if not kept:
        return "none", "", ""
    return f"{len(kept)} problems", _interval(exact_binomial(sum(kept), len(kept))), f"-{len(kept) - sum(kept)}"


def _interval(x: Interval, digits: str = ".2f") -> str:
    return f"{x.value:{digits}} [{x.low:{digits}}, {x.high:{digits}}]"
