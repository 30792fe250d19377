"""Which prompt each response of a batch belongs to, told by its texts where rows were dropped, repeated or moved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Text = tuple[int, int]  # hashes of a prompt's and a response's tokens


def texts(prompts: Iterable[Sequence[int]], responses: Iterable[Sequence[int]], pad: int) -> list[Text]:
    """Of each row; padding at a response's end does not count."""
    return [(hash(tuple(p)), hash(_stripped(r, pad))) for p, r in zip(prompts, responses, strict=True)]


def _stripped(tokens: Sequence[int], pad: int) -> tuple[int, ...]:
    end = len(tokens)
    while end and tokens[end - 1] == pad:
        end -= 1
    return tuple(tokens[:end])


def texts_of(prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, pad: int) -> list[Text]:
    """The same of padded tensors, (n, tokens) each."""
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)]
    return texts(prompts, completion_ids.tolist(), pad)


def owners(rows: Sequence[Text], known: Sequence[Text], ids: Sequence[int], *, by_prompt: bool) -> list[int]:
    """The group of each row, of which `known` rows have the groups `ids`.

    By place where the texts are the known ones, else by text; where a text is new, or in several groups, rows with one
    prompt are a group.

    Args:
        rows, known, ids: see above.
        by_prompt: whether a prompt's tokens are all there is of it; false with pictures.

    Raises:
        ValueError: only the prompts could tell, and they do not.

    Example:
        >>> known, ids = [(1, 5), (1, 6), (2, 5), (2, 7)], [0, 0, 1, 1]
        >>> owners([(2, 5), (1, 6), (1, 6)], known, ids, by_prompt=True)
        [1, 0, 0]
        >>> owners([(2, 9), (2, 8), (1, 9)], known, ids, by_prompt=True)
        [0, 0, 2]
    """
    if list(rows) == list(known):
        return list(ids)
    found: dict[Text, set[int]] = {}
    for text, q in zip(known, ids, strict=True):
        found.setdefault(text, set()).add(q)
    if all(len(found.get(text, ())) == 1 for text in rows):
        return [next(iter(found[text])) for text in rows]
    if not by_prompt:
        raise ValueError(
            "group_ids: rows of the batch were dropped, repeated or rewritten, and with pictures the prompts' tokens "
            "do not tell which responses belong together; keep texts and rows as they were generated"
        )
    prompts = [prompt for prompt, _ in rows]
    return [prompts.index(prompt) for prompt in prompts]


def shuffle_groups(batch: dict[str, Any], group_ids: Tensor) -> dict[str, Any]:
    """All sequences of a generation batch in a random order of groups, each group's responses together."""
    ids = torch.unique(group_ids)
    order = ids[torch.randperm(len(ids)).to(ids.device)]
    rows = torch.cat([torch.nonzero(group_ids == q).flatten() for q in order])

    def permute(value: Any) -> Any:
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        return value[rows.to(value.device)] if isinstance(value, Tensor) else [value[i] for i in rows.tolist()]

    return {key: permute(value) for key, value in batch.items()}
