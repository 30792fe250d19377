"""Any reasoning-gym data set as a GRPO task: few-shot prompts, a verifier, and disjoint problems to train and test on.

A prompt is `shots` worked examples and one question. In the "compact" style the words that all questions share are
dropped, up to ": " at their beginning and from ". " at their end, so that chain_sum reads

    4 - 1 = 3
    6 + 2 =

and a small model knows what to do ("802, 316. Give only the GCD as your final answer." is "802, 316 ="). "full" keeps
the whole text as "Question: ... / Answer:". The answer is the first line of the completion, or all up to an empty line
where the data set's answers have several lines.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any

DEFAULT_OPTIONS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
"""Options that suit a very small model; what the user gives goes on top."""

_PATIENCE = 2000
_SAMPLE = 24
_CHUNK = 128  # some data sets make all items at once
_SHOTS, _HELDOUT, _TRAIN, _CORPUS = "shots3", "heldout", "train", "corpus"


@dataclass(frozen=True)
class Problem:
    """One question: the prompt that the model sees and the entry that the verifier needs."""

    prompt: str
    question: str
    answer: str
    entry: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Task:
    """A data set with its verifier; made by `load_task`."""

    name: str
    options: Mapping[str, Any]
    seed: int
    style: str
    shared: tuple[str, str]
    stop: str
    examples: str
    _shot_questions: frozenset[str]

    def score(self, problem: Problem, completion: str) -> float:
        """The data set's own verdict on the completion's first line, in [0, 1]; 1 is right."""
        answer = self.answer(completion)
        try:
            return float(_verifier(self.name, self.options).score_answer(answer, dict(problem.entry)))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, SyntaxError):
            return 0.0  # some verifiers raise on an answer that they cannot parse: it is not a right one

    def answer(self, completion: str) -> str:
        return completion.split(self.stop, 1)[0].strip()

    def heldout(self, count: int) -> list[Problem]:
        """`count` problems with different questions, none of which `training` yields when given them."""
        return self._distinct(_HELDOUT, count, set(self._shot_questions))

    def training(self, exclude: Sequence[Problem]) -> Iterator[Problem]:
        """Problems to train on, without end; the same sequence for the same seed."""
        banned = {problem.question for problem in exclude} | self._shot_questions
        misses = 0
        for problem in self._stream(_TRAIN):
            misses = misses + 1 if problem.question in banned else 0
            if misses > _PATIENCE:
                raise ValueError(
                    f"task {self.name}: all its questions are held out; lower --heldout or widen the task's options"
                )
            if not misses:
                yield problem

    def longest_answer(self, tokenizer: Any) -> int:
        """Tokens of the longest reference answer and its end, among the first few problems of the corpus."""
        answers = [f" {problem.answer}{self.stop}" for problem in itertools.islice(self.corpus(), _SAMPLE)]
        return max(len(ids) for ids in tokenizer(answers)["input_ids"])

    def corpus(self) -> Iterator[Problem]:
        """Problems of the whole distribution, from which `tiny` learns to read the task."""
        return self._stream(_CORPUS)

    def _stream(self, split: str) -> Iterator[Problem]:
        for entry in _entries(self.name, self.options, self.seed, split):
            yield self._problem(entry)

    def _distinct(self, split: str, count: int, seen: set[str]) -> list[Problem]:
        problems: list[Problem] = []
        misses = 0
        for problem in self._stream(split):
            misses = misses + 1 if problem.question in seen else 0
            if not misses:
                seen.add(problem.question)
                problems.append(problem)
            if len(problems) == count:
                break
            if misses > _PATIENCE:
                raise ValueError(
                    f"task {self.name}: found only {len(problems)} different questions, {count} are to be held out; "
                    "lower --heldout or widen the task's options"
                )
        return problems

    def _problem(self, entry: Mapping[str, Any]) -> Problem:
        question = str(entry["question"])
        prompt = self.examples + render(question, None, self.style, self.shared)
        return Problem(prompt, question, str(entry["answer"]), entry)


def load_task(
    name: str, options: Mapping[str, Any] | None = None, *, seed: int = 0, shots: int = 4, style: str = "auto"
) -> Task:
    """A task by its reasoning-gym name.

    Raises:
        ValueError: an unknown name, option or style; near or valid ones are named.
    """
    if style not in ("auto", "compact", "full"):
        raise ValueError(f"--style: expected auto, compact or full, got {style!r}")
    chosen = {**DEFAULT_OPTIONS.get(name, {}), **(options or {})}
    _check(name, chosen)
    entries = _entries(name, chosen, 0, _SHOTS)  # seed 0: the examples belong to the task, not to the run
    sample = [next(entries) for _ in range(_SAMPLE)]
    shared = shared_words([str(e["question"]) for e in sample])
    several_lines = any("\n" in str(e["answer"]) for e in sample)
    one_line = not several_lines and all("\n" not in str(e["question"]) for e in sample)
    if style == "compact" and not one_line:
        raise ValueError(f"--style compact: the questions or answers of {name} have several lines; use --style full")
    if style == "auto":
        style = "compact" if shared[0] and one_line else "full"
    distinct = {str(e["question"]): e for e in sample if e["answer"] is not None}
    if shots and not distinct:
        raise ValueError(f"--shots {shots}: {name} has a verifier but no reference answers to show; use --shots 0")
    if len(distinct) < shots:
        raise ValueError(f"--shots {shots}: {name} offers few different questions; use at most {len(distinct)}")
    shown = dict(list(distinct.items())[:shots])
    examples = "".join(render(q, str(e["answer"]), style, shared) for q, e in shown.items())
    stop = "\n\n" if several_lines else "\n"
    return Task(name, chosen, seed, style, shared, stop, examples, frozenset(shown))


def shared_words(questions: list[str]) -> tuple[str, str]:
    """What all questions begin with, up to the last ": ", and end with, from the first full stop; "" for none."""
    if len(set(questions)) < 2:
        return "", ""
    start = _common_beginning(questions)
    start = start[: start.rfind(": ") + 2] if ": " in start else ""
    end = _common_beginning([q[::-1] for q in questions])[::-1]
    return start, end[end.index(". ") :] if ". " in end else ""


def _common_beginning(texts: list[str]) -> str:
    first, last = min(texts), max(texts)
    differing = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(differing, len(first))]


def render(question: str, answer: str | None, style: str, shared: tuple[str, str]) -> str:
    """A worked example, or with answer=None the question to be completed."""
    if style == "compact":
        text = question.removeprefix(shared[0]).removesuffix(shared[1]).strip()
        text += "" if text.endswith(("=", "?", ":")) else " ="
        return text if answer is None else f"{text} {answer}\n"
    text = f"Question: {question.strip()}\nAnswer:"
    return text if answer is None else f"{text} {answer}\n\n"


def task_names() -> list[str]:
    """Names of all reasoning-gym data sets."""
    return sorted(_gym().factory.DATASETS)


def _check(name: str, options: Mapping[str, Any]) -> None:
    datasets = _gym().factory.DATASETS
    if name not in datasets:
        near = difflib.get_close_matches(name, datasets, n=5, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "pcr-train --list-tasks prints all names"
        raise ValueError(f"--task: reasoning-gym has no data set {name!r}; {hint}")
    known = [f.name for f in fields(datasets[name][1]) if f.name not in ("seed", "size")]
    for option in options:
        if option not in known:
            raise ValueError(f"--task-option: {name} has no option {option!r}; it has {', '.join(known)}")
    try:
        _verifier(name, options)[0]
    except (AssertionError, ValueError, TypeError) as error:
        shown = ", ".join(f"{key}={value}" for key, value in options.items()) or "its defaults"
        raise ValueError(f"--task-option: {name} does not accept {shown}: {error}") from error


_instances: dict[tuple[str, str], Any] = {}


def _verifier(name: str, options: Mapping[str, Any]) -> Any:
    key = (name, repr(sorted(options.items())))
    if key not in _instances:
        _instances[key] = _dataset(name, options, 0)
    return _instances[key]


def _dataset(name: str, options: Mapping[str, Any], seed: int) -> Any:
    return _gym().create_dataset(name, seed=seed, size=_CHUNK, **options)


def _entries(name: str, options: Mapping[str, Any], seed: int, split: str) -> Iterator[Mapping[str, Any]]:
    # data sets draw item i from Random(seed + i), so neighbouring seeds share items: start far apart instead
    for chunk in itertools.count():
        dataset = _dataset(name, options, random.Random(f"{seed}/{split}/{chunk}").randrange(1 << 31))
        for index in range(_CHUNK):
            yield dataset[index]


def _gym() -> Any:
    """reasoning_gym; with a stand-in for pycosat where that C extension could not be built."""
    try:
        importlib.import_module("pycosat")
    except ImportError:
        sys.modules["pycosat"] = _NoPycosat("pycosat")
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            f"pcr-train needs reasoning-gym for its tasks ({error}); install it with: pip install 'pcr-grpo[demo]'"
        ) from error
    return reasoning_gym


class _NoPycosat(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            "this puzzle needs the package pycosat: pip install pycosat (it has no wheel, so a C compiler is needed)"
        )
