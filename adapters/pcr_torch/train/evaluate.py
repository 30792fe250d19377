"""What a model can do before and after: held-out problems, problems it solved before, and a fixed text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pcr_torch.train.tasks import Problem, Task

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

    def known(self, model: Any, tokenizer: Any) -> list[Problem]:
        """Problems of the other task that `model` solves greedily."""
        if self.other is None:
            return []
        with _measuring(model, self.seed):
            solved = self._solved(model, tokenizer, self.other, self.pool, self.max_tokens[1])
        return [problem for problem, right in zip(self.pool, solved, strict=True) if right]

    def measure(self, model: Any, tokenizer: Any, known: Sequence[Problem]) -> Evaluation:
        """All measurements of `model`; `known` is the retention set."""
        prompts = [p.prompt for p in self.problems for _ in range(self.samples)]
        with _measuring(model, self.seed):
            drawn = respond(model, tokenizer, prompts, max_tokens=self.max_tokens[0], temperature=self.temperature)
            scores = [
                self.task.score(p, drawn[i * self.samples + j])
                for i, p in enumerate(self.problems)
                for j in range(self.samples)
            ]
            return Evaluation(
                reward=np.asarray(scores).reshape(len(self.problems), self.samples).mean(1).tolist(),
                heldout=self._solved(model, tokenizer, self.task, self.problems, self.max_tokens[0]),
                retention=self._solved(model, tokenizer, self.other, known, self.max_tokens[1]),
                text=text_nll(model, tokenizer, RETENTION_TEXT),
            )

    def _solved(
        self, model: Any, tokenizer: Any, task: Task | None, problems: Sequence[Problem], limit: int
    ) -> list[bool]:
        if task is None:
            return []
        answers = respond(model, tokenizer, [p.prompt for p in problems], max_tokens=limit)
        return [task.score(p, a) >= 1 for p, a in zip(problems, answers, strict=True)]


@contextmanager
def _measuring(model: Any, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, a random state of its own; mode and random state come back."""
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)


def respond(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, batch: int = 64
) -> list[str]:
    """One completion a prompt, greedy at temperature 0; ends where `models.load` said responses end."""
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=max_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    out: list[str] = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(
            list(prompts[start : start + batch]), return_tensors="pt", padding=True, padding_side="left"
        ).to(model.device)
        ids = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config
        )
        out += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


def text_nll(model: Any, tokenizer: Any, text: str) -> float:
    """Mean negative log-likelihood of `text`, nats a token."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    logits = model(input_ids=ids).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


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
