"""What a model can do before and after: held-out problems, problems it solved before, and a fixed text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pcr_train.engine import Policy
from pcr_train.tasks import Problem, Task

RETENTION_TEXT = """\
The ferry leaves the small harbour twice a day. In the morning it carries bread, letters and a few sleepy children to
the school on the other island; in the evening it brings the children back, louder than before, together with the
doctor, who visits her patients there on Tuesdays. Nobody checks the tickets any more, because the captain knows every
passenger by name and remembers who has already paid for the month.
When the wind turns to the north, the water in the channel grows steep and grey. On such days the captain waits. He
drinks his tea in the little office, looks at the barometer, and tells anyone who asks that the sea is not in a hurry.
People grumble, but they know that he is right: in forty years he has never lost so much as a suitcase.
Last winter the company offered to replace the old boat with a faster one. There was a meeting in the village hall, and
after two hours of talk the islanders voted to keep what they had. A fast boat, said the baker, would only make the
mornings shorter.
"""
"""Original text; its negative log-likelihood shows how far the model has drifted from plain English."""


@dataclass(frozen=True)
class Interval:
    """An estimate with a 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """Measurements of one model.

    Attributes:
        reward: mean reward on held-out problems at the training temperature, one number a problem.
        heldout: held-out problems solved greedily, one flag a problem.
        retention: problems of the retention task solved greedily, one flag a problem.
        text: negative log-likelihood of `RETENTION_TEXT`, nats a token.
    """

    reward: list[float]
    heldout: list[bool]
    retention: list[bool]
    text: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Exam:
    """What a model is measured on; the same before and after training.

    Attributes:
        task: the task that is trained, with held-out `problems`, and `samples` responses to each at `temperature`.
        other: a second task with a `pool` of problems; those that the model solves before are its retention set.
        max_tokens: longest response on each of the two tasks.
    """

    task: Task
    problems: Sequence[Problem]
    other: Task | None
    pool: Sequence[Problem]
    samples: int
    temperature: float
    max_tokens: tuple[int, int]
    seed: int

    def known(self, policy: Policy) -> list[Problem]:
        """Problems of the other task that `policy` solves greedily."""
        solved = self._solved(policy, self.other, self.pool, self.max_tokens[1])
        return [problem for problem, right in zip(self.pool, solved, strict=True) if right]

    def measure(self, policy: Policy, known: Sequence[Problem]) -> Evaluation:
        """All measurements of `policy`; `known` is the retention set."""
        prompts = [p.prompt for p in self.problems for _ in range(self.samples)]
        drawn = policy.respond(prompts, max_tokens=self.max_tokens[0], temperature=self.temperature, seed=self.seed)
        scores = [
            self.task.score(p, drawn[i * self.samples + j])
            for i, p in enumerate(self.problems)
            for j in range(self.samples)
        ]
        return Evaluation(
            reward=np.asarray(scores).reshape(len(self.problems), self.samples).mean(1).tolist(),
            heldout=self._solved(policy, self.task, self.problems, self.max_tokens[0]),
            retention=self._solved(policy, self.other, known, self.max_tokens[1]),
            text=policy.text_nll(RETENTION_TEXT),
        )

    def _solved(self, policy: Policy, task: Task | None, problems: Sequence[Problem], limit: int) -> list[bool]:
        if task is None:
            return []
        answers = policy.respond([p.prompt for p in problems], max_tokens=limit)
        return [task.score(p, a) >= 1 for p, a in zip(problems, answers, strict=True)]


def exact_binomial(right: int, count: int, level: float = 0.95) -> Interval:
    """Clopper-Pearson: the exact interval of a proportion."""
    if count == 0:
        return Interval(math.nan, math.nan, math.nan)
    tail = (1 - level) / 2

    def at_least(k: int, p: float) -> float:
        return sum(math.comb(count, i) * p**i * (1 - p) ** (count - i) for i in range(k, count + 1))

    low = 0.0 if right == 0 else _crossing(lambda p: at_least(right, p) - tail)
    high = 1.0 if right == count else _crossing(lambda p: at_least(right + 1, p) - (1 - tail))
    return Interval(right / count, low, high)


def bootstrap(values: Sequence[float], level: float = 0.95, draws: int = 4000) -> Interval:
    """Percentile bootstrap of a mean over problems, with a fixed seed."""
    x = np.asarray(values, dtype=float)
    means = np.random.default_rng(0).choice(x, size=(draws, len(x))).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high))


def _crossing(increasing: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < 0 else (low, middle)
    return (low + high) / 2
