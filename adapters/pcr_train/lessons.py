"""What the built-in tiny model knows before GRPO: characters, and worked examples of a teacher who often shrugs.

It is taught by cross-entropy, and not for long. So it solves part of the problems and has a habit to lose: a starting
point that GRPO can improve within few steps, as with a real model.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pcr_train.tasks import Task

STEPS, BATCH, RATE = 400, 64, 5e-3
ANSWERED, SHRUG = 0.7, "?"
"""How often the teacher gives the right answer; else it shrugs."""

LONGEST = 512
"""Characters of a worked example; longer ones lose their beginning."""

PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY = {
    token: i for i, token in enumerate([PAD, END, UNKNOWN, *(c for c in string.printable if c not in "\t\r\x0b\x0c")])
}
"""One token a printable ASCII character; anything else is <unk>."""


class CharacterTokenizer:
    """Texts to ids of `VOCABULARY` and back, called as a Hugging Face tokenizer is.

    Example:
        >>> tokenizer = CharacterTokenizer()
        >>> tokenizer(["1 = "])["input_ids"]
        [[4, 97, 83, 97]]
        >>> tokenizer.decode([4, 97, VOCABULARY[END]])
        '1 '
    """

    def __call__(self, texts: Sequence[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[VOCABULARY.get(c, VOCABULARY[UNKNOWN]) for c in text] for text in texts]}

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without the special tokens."""
        return "".join(_CHARACTERS[i] for i in ids if _CHARACTERS[i] not in (PAD, END, UNKNOWN))


_CHARACTERS = list(VOCABULARY)


@dataclass(frozen=True)
class Lesson:
    """A worked example: token ids, and how many of them are the prompt."""

    ids: list[int]
    prompt: int


def lessons(task: Task, tokenizer: Any, answered: Callable[[int], Sequence[bool]]) -> Iterator[list[Lesson]]:
    """Batches without end; `answered(n)` draws which of n examples the teacher answers."""
    problems = task.corpus()
    while True:
        batch = list(itertools.islice(problems, BATCH))
        told = [f" {p.answer if known else SHRUG}{task.stop}" for p, known in zip(batch, answered(BATCH), strict=True)]
        prompts = tokenizer([p.prompt for p in batch])["input_ids"]
        answers = tokenizer(told)["input_ids"]
        yield [
            Lesson((prompt + answer)[-LONGEST:], max(min(len(prompt), LONGEST - len(answer)), 0))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
