"""The tiny language model in NumPy, with its gradients by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pcr_conformance.trainers.problem import Floats, TrainerBatch

NAMES = ("embed", "up", "down", "head")


def logp(weights: Mapping[str, Floats], batch: TrainerBatch) -> Floats:
    """(n, T) log-probabilities of the response tokens.

    Example:
        >>> from pcr_conformance.trainers import make_problem
        >>> problem = make_problem(0)
        >>> logp(problem.weights, problem.batches[0]).shape == problem.batches[0].mask.shape
        True
    """
    logs = _log_softmax(_forward(weights, batch.tokens)[-1] @ weights["head"])[:, batch.prompt - 1 : -1]
    chosen: Floats = np.take_along_axis(logs, batch.tokens[:, batch.prompt :, None], axis=-1)[..., 0]
    return chosen


def contributions(weights: Mapping[str, Floats], batch: TrainerBatch, cotangent: Floats) -> dict[str, Floats]:
    """By name, (n, *shape): what each response adds to a weight's gradient, for d loss/d logp of shape (n, T)."""
    tokens, first = batch.tokens, batch.prompt
    x, hidden, y = _forward(weights, tokens)
    words = np.eye(len(weights["embed"]))
    at_logits = np.zeros((*tokens.shape, len(words)))
    residual = words[tokens[:, first:]] - np.exp(_log_softmax(y @ weights["head"]))[:, first - 1 : -1]
    at_logits[:, first - 1 : -1] = cotangent[..., None] * residual
    at_y = at_logits @ weights["head"].T
    at_hidden = at_y @ weights["down"].T * (1 - hidden**2)
    at_x = at_y + at_hidden @ weights["up"].T
    later = at_x / np.arange(1, tokens.shape[1] + 1)[:, None]
    at_embedded = at_x + later[:, ::-1].cumsum(axis=1)[:, ::-1]  # a token is in the mean of each that follows
    return {
        "embed": _each(words[tokens], at_embedded),
        "up": _each(x, at_hidden),
        "down": _each(hidden, at_y),
        "head": _each(y, at_logits),
    }


def _forward(weights: Mapping[str, Floats], tokens: Any) -> tuple[Floats, Floats, Floats]:
    embedded = weights["embed"][tokens]
    x = embedded + embedded.cumsum(axis=1) / np.arange(1, tokens.shape[1] + 1)[:, None]
    hidden = np.tanh(x @ weights["up"])
    return x, hidden, x + hidden @ weights["down"]


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logs: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs


def _each(inputs: Floats, outputs: Floats) -> Floats:
    products: Floats = np.einsum("nti,ntj->nij", inputs, outputs)
    return products
