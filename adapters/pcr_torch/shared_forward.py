"""One evaluation of a TRL loss on one forward pass, taken apart into the gradients of its reward and its KL term.

Whatever a trainer and its subclasses make of the loss, it is a function of the log-probabilities, of beta and of the
advantages. All three are made leaves of a small autograd graph that ends at the log-probabilities. The loss is linear
in beta, so beta times the derivative of d loss/d beta is the KL term's part, and the rest is the reward's; and it is
homogeneous in the advantages, which tells a term that is neither.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pcr_torch.rows import is_leaf
from pcr_torch.separability import NEITHER, refuse_loss

_ASIDE = ("batch_size", "compute_entropy", "compute_aux_loss")  # of a request: what leaves the log-probabilities alone


class SharedForward:
    """Leaves of one microbatch's loss.

    Args:
        policy: the model that is trained, as it is and as it is wrapped.
    """

    def __init__(self, *policy: Any) -> None:
        self._policy = policy
        self.logp: Tensor | None = None  # with the model's graph
        self._leaf: Tensor | None = None
        self._entropies: Tensor | None = None
        self._request: Any = None
        self._result: Any = None
        self._betas: list[Tensor] = []
        self._advantages: Tensor | None = None

    def beta(self, value: float) -> Tensor:
        """beta as a leaf; the same one until the value changes."""
        if not self._betas or self._betas[-1].item() != value:
            self._betas.append(torch.tensor(value, dtype=torch.float64, requires_grad=True))
        return self._betas[-1]

    def advantages(self, values: Tensor) -> Tensor:
        """The advantages as a leaf, which may be worked on in place."""
        self._advantages = values.detach().clone().requires_grad_()
        return self._advantages * 1

    def logps(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's log-probabilities, entropies and router loss: those of the first request that trains are shared."""
        asked = inspect.signature(compute).bind(*args, **kwargs)
        asked.apply_defaults()
        request = {name: value for name, value in asked.arguments.items() if name not in _ASIDE}
        if self.logp is not None and _same(request, self._request):
            _, entropies, aux_loss = self._result
            if asked.arguments.get("compute_entropy") and entropies is None:
                with torch.no_grad():
                    entropies = compute(*args, **kwargs)[1]
            return self._leaf, entropies, aux_loss
        result = compute(*args, **kwargs)
        mine = any(asked.arguments.get("model") is each for each in self._policy)
        if self.logp is not None or not mine or not result[0].requires_grad:
            return result
        self.logp, entropies, aux_loss = result
        self._request, self._leaf = request, self.logp.detach().requires_grad_()
        if entropies is not None:
            self._entropies = entropies = entropies.detach().requires_grad_()
        self._result = (self._leaf, entropies, aux_loss)
        return self._result

    def cotangents(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The log-probabilities with their graph, and the derivatives of the reward and of the KL term.

        Raises:
            ValueError: the loss has no graph, or terms that belong to neither, with the reason.
        """
        if not loss.requires_grad:
            raise ValueError(
                "compute_loss: the loss has no autograd graph (it was detached, or made anew from a number), so there "
                "is nothing to differentiate; return what `_compute_loss` gave, or a function of it"
            )
        leaf = self._leaf
        if leaf is None or self.logp is None:
            raise ValueError(
                "compute_loss: its log-probabilities did not come from self._get_per_token_logps_and_entropies, so the "
                f"reward and the KL term cannot be told apart; {NEITHER}"
            )
        self._refuse_foreign(loss)
        (whole,) = torch.autograd.grad(loss, leaf, create_graph=True, allow_unused=True)
        if whole is None:  # a step that a subclass dropped
            return self.logp, torch.zeros_like(leaf), torch.zeros_like(leaf)
        slopes = torch.autograd.grad(loss, self._betas, create_graph=True, allow_unused=True) if self._betas else ()
        used = [(beta, slope) for beta, slope in zip(self._betas, slopes) if slope is not None]
        if not used:
            raise ValueError(
                "compute_loss: the loss does not depend on self.beta (was it read as a number, or from args?), so its "
                f"KL term cannot be told apart; {NEITHER}"
            )
        stability = torch.zeros_like(leaf)
        for beta, slope in used:
            if _derivative(slope, beta).ne(0).any():
                raise ValueError(
                    "compute_loss: the loss is not linear in self.beta, so it is no weighted sum of a reward and a KL "
                    f"term; {NEITHER}"
                )
            stability += (beta * _derivative(slope, leaf)).to(leaf.dtype)
        whole, stability = whole.detach(), stability.detach()
        self._refuse_other_terms(loss, leaf, whole, stability)
        return self.logp, whole - stability, stability

    def _refuse_other_terms(self, loss: Tensor, leaf: Tensor, whole: Tensor, stability: Tensor) -> None:
        if self._advantages is None:
            return
        (slope,) = torch.autograd.grad(loss, self._advantages, create_graph=True, allow_unused=True)
        if slope is None:
            refuse_loss(whole, torch.zeros_like(leaf), stability)
        else:
            refuse_loss(whole, _derivative((slope * self._advantages.detach()).sum(), leaf), stability)

    def _refuse_foreign(self, loss: Tensor) -> None:
        known = [self._leaf, self._advantages, *self._betas]
        for leaf in _leaves(loss):
            if leaf is self._entropies:
                raise ValueError(f"loss: it has a term in the entropies, and {NEITHER}")
            if isinstance(leaf, torch.nn.Parameter):
                raise ValueError(f"loss: a term of it has a forward pass of its own, and {NEITHER}")
            if not any(leaf is each for each in known) and self._leaf is not None and self._reaches(loss):
                raise ValueError(f"loss: it has a term in a tensor that is trained outside the model, and {NEITHER}")

    def _reaches(self, loss: Tensor) -> bool:
        return any(leaf is self._leaf for leaf in _leaves(loss))


def _derivative(value: Tensor, leaf: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    start = cast(Node, loss.grad_fn)
    if start is None:
        yield loss
        return
    waiting, seen = [start], {start}
    while waiting:
        node = waiting.pop()
        if is_leaf(node):
            yield cast(Any, node).variable
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)


def _same(one: Any, other: Any) -> bool:
    """Whether two requests ask for the same: the same model, equal texts and options."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all()))
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, torch.nn.Module) or isinstance(other, torch.nn.Module):
        return one is other
    return bool(one == other)
