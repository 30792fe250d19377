"""Where the rows (tokens) of each response lie among a layer's activations, and which responses are of one stratum.

Made once a microbatch from what the host knows, and copied to the device without waiting for it. After that nothing
on the host depends on a number on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Spans of rows, a response each; by `even` for a row of tokens a response, by `owned` for anything else.

    Attributes:
        starts: (responses,) on the host: the first row of each response.
        lengths: (responses,) on the host: how many rows it has, possibly none.
        rows: (rows,) on the host: which row of the activations each row of the spans is; None where they are the same.
        strata: responses of each stratum.
        device: of the activations.

    Example:
        >>> layout = Layout.even(2, 3, [[0, 1]], torch.device("cpu"))
        >>> layout.starts, layout.lengths
        (array([0, 3]), array([3, 3]))
    """

    starts: Any
    lengths: Any
    rows: Any
    strata: Sequence[Sequence[int]]
    device: torch.device

    def __post_init__(self) -> None:
        if sorted(i for members in self.strata for i in members) != list(range(self.responses)):
            raise ValueError(
                f"strata must hold each of 0 to {self.responses - 1} once, got {[list(each) for each in self.strata]}"
            )

    @classmethod
    def even(cls, n: int, length: int, strata: Sequence[Sequence[int]], device: torch.device) -> Layout:
        """Of activations (n, length, features), a row of tokens a response.

        Args:
            n: responses.
            length: tokens of each.
            strata: responses of each stratum, together 0 to n - 1.
            device: of the activations.
        """
        return cls(np.arange(n) * length, np.full(n, length), None, strata, device)

    @classmethod
    def owned(cls, owners: Any, n: int, strata: Sequence[Sequence[int]], device: torch.device) -> Layout:
        """Of activations (rows, features), the responses of any lengths, in any order, also mixed.

        Args:
            owners: (rows,) integers on the host: each row's response; a row of none of 0 to n - 1 is left out.
            n: responses.
            strata: responses of each stratum, together 0 to n - 1.
            device: of the activations.

        Example:
            A packed row of three responses, one of them empty, and padding:

            >>> layout = Layout.owned([2, 2, 2, 0, 0, -1], 3, [[0, 2], [1]], torch.device("cpu"))
            >>> layout.starts, layout.lengths
            (array([3, 0, 0]), array([2, 0, 3]))
        """
        owners = np.asarray(owners, dtype=np.int64).reshape(-1)
        owners = np.where((owners >= 0) & (owners < n), owners, n)
        order = np.argsort(owners, kind="stable")
        lengths = np.bincount(owners, minlength=n + 1)[:n]
        starts = np.cumsum(lengths) - lengths
        mine = order[: lengths.sum()]
        there, of = mine[1:], owners[mine]
        if (there - mine[:-1] == 1)[of[1:] == of[:-1]].all():  # each in one piece
            first = np.append(order, 0)[starts]
            return cls(np.where(lengths > 0, first, 0), lengths, None, strata, device)
        return cls(starts, lengths, mine, strata, device)

    @property
    def responses(self) -> int:
        return len(self.lengths)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """On the device in int32, of the responses in the order of the strata: which response, its first row, the row
        after its last; and (strata + 1,) the first place of each stratum."""
        order = np.array([i for members in self.strata for i in members], dtype=np.int64)
        starts = self.starts[order]
        bounds = np.cumsum([0, *map(len, self.strata)])
        whole = self._copied(np.concatenate([order, starts, starts + self.lengths[order], bounds]).astype(np.int32))
        n = self.responses
        return whole[:n], whole[n : 2 * n], whole[2 * n : 3 * n], whole[3 * n :]

    @cached_property
    def gathered(self) -> Tensor | None:
        """`rows` on the device, in int32."""
        return None if self.rows is None else self._copied(self.rows.astype(np.int32))

    def by_response(self, activations: Tensor) -> Tensor:
        """(rows, features) -> (responses, longest, features), zeros where one is shorter; a view where it can be."""
        if self._is_even:
            return self._viewed(activations, self.responses)
        return _padded(activations, *self._response_rows)

    def by_stratum(self, activations: Tensor) -> Tensor:
        """(rows, features) -> (strata, most rows, features), zeros where one has fewer; a view where it can be."""
        if self._is_even and self._is_sorted:
            return self._viewed(activations, len(self.strata))
        return _padded(activations, *self._stratum_rows)

    def stratum_sums(self, parts: Tensor) -> Tensor:
        """(responses, ...) -> (strata, ...), summed."""
        if self._is_sorted:
            return parts.view(len(self.strata), -1, *parts.shape[1:]).sum(dim=1)
        return _padded(parts.flatten(1), *self._members).sum(dim=1).view(-1, *parts.shape[1:])

    def _viewed(self, activations: Tensor, sets: int) -> Tensor:
        rows = int(self.lengths.sum())  # behind them may be some that are nobody's
        return activations[:rows].view(sets, rows // sets, activations.shape[-1])

    @cached_property
    def _is_even(self) -> bool:
        """Whether every response has as many rows, in order, and no row is nobody's before the last."""
        steps = np.arange(self.responses) * self.lengths[0]
        return self.rows is None and bool((self.lengths == self.lengths[0]).all() and (self.starts == steps).all())

    @cached_property
    def _is_sorted(self) -> bool:
        """Whether strata are of one size, and hold responses in their order."""
        order = [i for members in self.strata for i in members]
        return len({len(members) for members in self.strata}) == 1 and order == list(range(self.responses))

    @cached_property
    def _response_rows(self) -> tuple[Tensor, Tensor]:
        return self._rows_of([[i] for i in range(self.responses)])

    @cached_property
    def _stratum_rows(self) -> tuple[Tensor, Tensor]:
        return self._rows_of(self.strata)

    @cached_property
    def _members(self) -> tuple[Tensor, Tensor]:
        return self._table([np.asarray(members) for members in self.strata])

    def _rows_of(self, sets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        spans = [[np.arange(self.starts[i], self.starts[i] + self.lengths[i]) for i in one] for one in sets]
        mine = [np.concatenate(each) for each in spans]
        return self._table(mine if self.rows is None else [self.rows[each] for each in mine])

    def _table(self, lists: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """(lists, longest) of indices, and (lists, longest, 1) where there is none."""
        table = np.full((len(lists), max(1, *map(len, lists))), -1)
        for line, taken in zip(table, lists, strict=True):
            line[: len(taken)] = taken
        at = self._copied(table)
        return at.clamp(min=0), (at < 0)[..., None]

    def _copied(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _padded(activations: Tensor, at: Tensor, absent: Tensor) -> Tensor:
    picked = activations.index_select(0, at.view(-1)).view(*at.shape, activations.shape[-1])
    return picked.masked_fill_(absent, 0)
