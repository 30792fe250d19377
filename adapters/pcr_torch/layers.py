"""The linear layers of a model that hold block parameters, and why other block parameters have no probe."""

from __future__ import annotations

from collections import Counter

from torch import nn

from pcr_torch.graph.owner_arrays import Owners
from pcr_torch.graph.owners import Survey
from pcr_torch.probe import Receiver, install, layout, remove


class Layers:
    """Plain linear layers that hold block parameters.

    Args:
        model: the module itself, without a wrapper.
        parameters: the block parameters by name.

    Attributes:
        members: by a layer's path, the names of its block parameters by attribute, "weight" or "bias". By attribute
            and not by identity: sharding libraries swap the parameters of a module around its forward.
        transposed: paths of those that store the weight (in, out).
        uncovered: of block parameters that no probe measures: why.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._modules: dict[str, nn.Module] = {}
        self._installed = False
        self.members: dict[str, dict[str, str]] = {}
        self.transposed: set[str] = set()
        self.uncovered: dict[str, str] = {}
        names = {id(p): name for name, p in parameters.items()}
        uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        for path, module in model.named_modules():
            held = {at: getattr(module, at, None) for at in ("weight", "bias")}
            mine = {at: names[id(p)] for at, p in held.items() if id(p) in names}
            if layout(module) is not None and mine:
                self._modules[path] = module
                if layout(module) == "in_out":
                    self.transposed.add(path)
                self.members[path] = mine
        found = {name for mine in self.members.values() for name in mine.values()}
        for name, p in parameters.items():
            if name not in found:
                self.uncovered[name] = "it is in no plain linear layer, or its layer's forward was replaced"
            elif uses[id(p)] > 1:  # its gradient has parts from several layers, and its norms need their sum
                self.uncovered[name] = "it is tied"

    def install(self, receiver: Receiver) -> None:
        """Puts probes on every layer, unless they are there."""
        if self._installed:
            return
        self._installed = True
        for path, module in self._modules.items():
            if layout(module) is not None:  # else other code has replaced its forward meanwhile
                install(module, receiver, path)

    def remove(self, receiver: Receiver) -> None:
        """Takes the probes off."""
        if not self._installed:
            return
        self._installed = False
        for module in self._modules.values():
            remove(module, receiver)

    def unmeasurable(self, found: Survey, *, trusting: bool, sharded: bool) -> tuple[dict[str, str], dict[str, Owners]]:
        """Why block parameters cannot be measured in one forward pass, and the owners of the layers' rows.

        Args:
            found: what the graph of the forward pass says.
            trusting: whether rows whose owners are not known are taken to be those of the responses, in their order.
            sharded: whether parameters are swapped around the forward pass, so that leaves do not tell them.

        Returns:
            Reasons by the parameter's name, and owners by the layer's path.
        """
        owners_of: dict[str, Owners] = {}
        why = dict(self.uncovered)
        for path, mine in self.members.items():
            calls = found.calls.get(path, [])
            reason = "its layer is used twice in one forward pass" if len(calls) > 1 else None
            if len(calls) == 1:
                owners = calls[0]
                if not isinstance(owners, str):
                    owners_of[path] = owners
                elif not trusting:
                    reason = f"the rows of its input are not known to be those of the responses ({owners})"
            for name in mine.values():
                if id(self._parameters[name]) in found.bypassed and not sharded:
                    why.setdefault(
                        name,
                        "it is used outside its layer (tied, or read by a fused kernel or another forward), or "
                        "logp was computed before PCR(model) was made",
                    )
                elif reason is not None:
                    why.setdefault(name, reason)
        return why, owners_of
