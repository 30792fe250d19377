"""One law against one trainer, as the same record that the laws of array libraries give."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from pcr_conformance.laws.checks import collect
from pcr_conformance.trainers.adapter import TrainerAdapter, Unsupported
from pcr_conformance.trainers.draw import Draw
from pcr_conformance.trainers.registry import TRAINER_LAWS, TrainerLaw
from pcr_conformance.verdict import Verdict


def judge_trainer(law: TrainerLaw, adapter: TrainerAdapter, examples: int, seed: int) -> Verdict:
    """Try the law on problems in turn, up to the first that fails; a crash inside the adapter is a failure.

    Problems that the adapter refuses with `Unsupported` are counted and named in the message; where it refuses all of
    them the law is skipped.

    Example:
        >>> from pcr_conformance.trainers import TRAINER_LAWS, load_trainer
        >>> verdict = judge_trainer(TRAINER_LAWS[0], load_trainer("numpy"), examples=3, seed=0)
        >>> verdict.outcome, verdict.examples
        ('passed', 3)
    """
    mode = "jit" if adapter.compiled else "eager"
    common = (adapter.name, law.name, "trainer", mode, adapter.device)
    reason = law.applies(adapter)
    if reason is not None:
        return Verdict(*common, outcome="skipped", message=reason, software=adapter.software)
    began, ran, message = time.perf_counter(), 0, ""
    refused: list[str] = []
    with collect() as worst:
        worst.dtype = adapter.dtype
        for number in range(examples):
            draw = Draw(law.name, seed, number)
            try:
                law.check(adapter, draw)
            except Unsupported as why:
                refused.append(str(why))
                continue
            except Exception as error:
                message = (
                    f"{type(error).__name__}: {error}\n{_described(draw)}\nAgain: --seed {seed} --examples {number + 1}"
                )
                ran += 1
                break
            ran += 1
    outcome = "failed" if message else "passed" if ran else "skipped"
    if refused and not message:
        message = f"{len(refused)} of {examples} problems not supported: {'; '.join(dict.fromkeys(refused))}"
    return Verdict(
        *common,
        outcome,
        ran,
        time.perf_counter() - began,
        dict(worst.ratios),
        message,
        adapter.software,
        dict(worst.numbers),
    )


def judge_trainers(adapters: Sequence[TrainerAdapter], examples: int, seed: int) -> Iterator[Verdict]:
    """Every law on every adapter, whatever fails on the way."""
    for adapter in adapters:
        for law in TRAINER_LAWS:
            yield judge_trainer(law, adapter, examples, seed)


def _described(draw: Draw) -> str:
    problem = draw.problem
    if problem is None:
        return ""
    batch = problem.batches[0]
    return (
        f"Problem {draw.number}: {problem.rule}, normalization={problem.normalization!r}, beta={problem.beta:g}, "
        f"learning_rate={problem.learning_rate:g}, {len(problem.batches)} steps of {batch.mask.shape[0]} responses "
        f"(padded to {batch.mask.shape[1]} tokens), groups {batch.group_ids.tolist()}, split {batch.split}"
    )
