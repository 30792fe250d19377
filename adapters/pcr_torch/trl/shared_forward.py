"""One evaluation of a trainer's loss, cut off at the log-probabilities, and taken apart into its two streams.

Whoever wrote the loss sees log-probabilities that are a leaf, beta times 1 and advantages times 1, where both ones are
leaves too. A KL term is in proportion to beta, a reward term to the advantages, so that each is the loss's derivative
with respect to its one; the derivatives of those with respect to the log-probabilities are the two cotangents.
Whatever is done to the value of the loss until its backward pass is part of its graph, and counts. The router loss of a
mixture of experts, which belongs to neither stream, is cut off like the log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pcr_torch.trl.separability import NEITHER
from pcr_torch.trl.tagged_float import TaggedFloat
from pcr_torch.trl.terms import all_tagged, leaves

_ROUNDING = 1e-5  # of sums in float32; the terms of TRL's losses agree to 1e-6
_FORWARD = (
    "take log-probabilities from self._get_per_token_logps_and_entropies, and compute under torch.no_grad() what is "
    "not to be trained"
)


@dataclass(frozen=True)
class Cut:
    """One forward pass of the trained model: what was asked, its outputs, and the leaves in their place."""

    request: Mapping[str, Any]
    logp: Tensor
    leaf: Tensor
    entropies: Tensor
    router: Tensor | None = None  # the auxiliary loss of a mixture of experts
    router_leaf: Tensor | None = None

    def __post_init__(self) -> None:
        for leaf in (self.leaf, self.router_leaf):
            if leaf is not None:
                leaf.register_post_accumulate_grad_hook(_refuse_backward)  # type: ignore[no-untyped-call]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        given = (self.leaf, self.entropies, self.router_leaf)
        return tuple(leaf for leaf in given if leaf is not None)


@dataclass(frozen=True)
class Streams:
    """Log-probabilities (n, T) of one forward pass, and the loss's two derivatives with respect to them.

    Attributes:
        router: the loss's derivative with respect to the router loss of that forward pass; None where it has none.
    """

    cut: Cut
    plasticity: Tensor
    stability: Tensor
    router: Tensor | None = None


class _Tagged(torch.autograd.Function):
    """Values times 1. What it saves outlives backward passes, of which another loss may take one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, one: Tensor) -> Tensor:
        ctx.values, ctx.dtype = values.clone(), one.dtype  # they may be worked on in place
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        of_values = gradient if ctx.needs_input_grad[0] else None
        return of_values, (gradient * ctx.values).sum().to(ctx.dtype)


class Ones:
    """The leaves, those of a trainer: a loss may keep what it has made of beta or of advantages for later."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.of_beta = torch.ones((), device=device, dtype=dtype, requires_grad=True)
        self.of_advantages = torch.ones((), device=device, dtype=dtype, requires_grad=True)


class SharedForward:
    """What a loss is given, and what becomes of it."""

    def __init__(self, ones: Ones) -> None:
        self._of_beta, self._of_advantages = ones.of_beta, ones.of_advantages
        self._cuts: list[Cut] = []
        self._root: set[int] = set()  # what the loss that was returned is made of

    def beta(self, value: float) -> TaggedFloat:
        with torch.enable_grad():
            return TaggedFloat(value, self._of_beta * value)

    def advantages(self, values: Tensor) -> Tensor:
        """Times 1, unless they are that already."""
        if any(leaf is self._of_advantages for leaf in leaves(values)):
            return values
        tagged: Tensor = _Tagged.apply(values, self._of_advantages)  # type: ignore[no-untyped-call]
        return tagged

    def returned(self, loss: Any) -> None:
        """The loss as compute_loss returns it; ValueError for what is none."""
        if not isinstance(loss, Tensor):
            what = "nothing" if loss is None else f"a {type(loss).__name__}"
            raise ValueError(
                f"loss: compute_loss returned {what}; return the loss alone, a tensor with its graph (not its "
                "number), and 0 * loss to leave a micro-batch out"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"loss: compute_loss returned a tensor of shape {tuple(loss.shape)}; reduce it to one number"
            )
        reached = {id(leaf) for leaf in leaves(loss)}
        self._root = reached & self._given() or reached

    def made(self, loss: Tensor) -> bool:
        """Whether a loss whose backward pass is asked for comes from the one that was returned."""
        return not loss.requires_grad or any(id(leaf) in self._root for leaf in leaves(loss))

    def trains(self, loss: Tensor) -> bool:
        """Whether a loss depends on a forward pass of the trained model."""
        return any(id(leaf) in self._given() for leaf in leaves(loss))

    def _given(self) -> set[int]:
        return {id(leaf) for cut in self._cuts for leaf in cut.leaves}

    def find(self, request: Mapping[str, Any]) -> Cut | None:
        """An earlier forward pass of the same model in the same state, on the same texts."""
        return next((cut for cut in self._cuts if _same(cut.request, request)), None)

    def cut(self, request: Mapping[str, Any], logp: Tensor, entropies: Tensor, router: Tensor | None = None) -> Cut:
        given = [None if x is None else x.detach().requires_grad_() for x in (logp, entropies, router)]
        leaf, entropy, router_leaf = given
        assert leaf is not None
        assert entropy is not None
        made = Cut(request, logp, leaf, entropy, router, router_leaf)
        self._cuts.append(made)
        return made

    def streams(self, loss: Tensor, model: nn.Module, *, sharded: bool, beta: float) -> Streams | None:
        """The two streams of `loss`; None where it does not depend on the model at all.

        Parameters of other models in its graph get their gradients.

        Args:
            loss: a scalar with a graph.
            model: the trained one.
            sharded: whether its parameters are swapped around its forward pass.
            beta: where it is 0 no KL term is expected.

        Raises:
            ValueError: the loss is detached, has a forward pass of the trained model of its own, or is not the sum of a
                reward and a KL term.
        """
        if not loss.requires_grad:
            raise ValueError(
                "loss: it has no graph (detached, or computed under torch.no_grad()), so nothing would be trained; "
                "return a loss with its graph, and 0 * loss to leave a micro-batch out"
            )
        mine = self._given() | {id(self._of_beta), id(self._of_advantages)}
        reached = leaves(loss)
        others = [leaf for leaf in reached if id(leaf) not in mine]
        trained = {id(p) for p in model.parameters()}
        # an activation is a leaf too where checkpointing hides what made it; a number is none
        hiding = [x for x in others if sharded or id(x) in trained or not isinstance(x, nn.Parameter)]
        if any(x.ndim for x in hiding):
            raise ValueError(f"loss: a term of it has a forward pass of its own, and {NEITHER}. Instead {_FORWARD}")
        if others:
            torch.autograd.backward(loss, inputs=others, retain_graph=True)
        ids = {id(leaf) for leaf in reached}
        used = [cut for cut in self._cuts if any(id(leaf) in ids for leaf in cut.leaves)]
        if len(used) > 1:
            raise ValueError(f"loss: it depends on log-probabilities of {len(used)} forward passes, and {NEITHER}")
        return self._apart(loss, used[0], beta) if used else None

    def _apart(self, loss: Tensor, cut: Cut, beta: float) -> Streams:
        logp, ones = cut.leaf, (self._of_beta, self._of_advantages)
        asked = (logp, cut.entropies, *ones, *cut.leaves[2:])
        try:
            first = torch.autograd.grad(loss, asked, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise ValueError(
                "loss: a backward pass of another loss has freed a part of its graph; give that one "
                "inputs['advantages'].detach() and float(self.beta)"
            ) from error
        whole = _of(first[0], logp)
        if first[1] is not None and bool(first[1].any()):
            raise ValueError(f"loss: it has a gradient through the entropies, as an entropy bonus has, and {NEITHER}")
        kl, reward = first[2:4]
        router = None if len(first) < 5 or first[4] is None else first[4].detach()
        if kl is None and beta != 0:
            raise ValueError(
                "loss: no term of it is multiplied by self.beta, so there is no KL term to tell from the reward; "
                "multiply it by self.beta itself, neither by a number made of it nor by args.beta"
            )
        stability, of_beta, of_advantages = _derivatives(kl, (logp, *ones))
        for what, found in (("beta", of_beta), ("the advantages", of_advantages)):
            if kl is not None and bool(found.abs() > _ROUNDING * kl.detach().abs()):
                raise ValueError(
                    f"loss: its KL term is not in proportion to beta but depends on {what} too, and {NEITHER}"
                )
        (plasticity,) = _derivatives(reward, (logp,))
        rounding = max(_ROUNDING, 4 * torch.finfo(logp.dtype).eps)
        if (whole - plasticity - stability).norm() <= rounding * (plasticity.norm() + stability.norm()):
            return Streams(cut, plasticity, stability, router)
        # the reward term is not in proportion to the advantages where those are clipped, say, or normalised
        if not all_tagged(loss, logp, ones):
            raise ValueError(
                f"loss: it is more than the sum of its reward and its KL term (what inputs['advantages'] and self.beta "
                f"multiply), and {NEITHER}"
            )
        return Streams(cut, whole - stability, stability, router)


def _derivatives(of: Tensor | None, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if of is None or not of.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    found = torch.autograd.grad(of, inputs, retain_graph=True, allow_unused=True)
    return tuple(_of(gradient, x) for gradient, x in zip(found, inputs, strict=True))


def _of(gradient: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if gradient is None else gradient.detach()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and one.device == other.device and torch.equal(one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other)


def _refuse_backward(_: Tensor) -> None:
    raise ValueError(
        "loss.backward() ends at the log-probabilities, whose backward passes PCR takes; call "
        "self.accelerator.backward(loss) in its place"
    )
