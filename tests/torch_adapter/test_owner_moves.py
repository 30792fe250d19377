"""Owners of rows through operations that move them: whatever the graph, a row is given to its response or to none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row_moves import STEPS, Chain
from torch import Tensor

from pcr_torch.graph.owner_arrays import NOBODY, spread
from pcr_torch.graph.owner_moves import moved
from pcr_torch.graph.owners import arrangement, survey


def claimed(chain: Chain) -> set[str]:
    """Layers whose rows are known; what comes to a row for another response's log-probabilities has to be 0."""
    output, found = chain.output, survey(chain.output).calls
    n = len(output)
    known = {path: of for path, (of, *more) in found.items() if not more and not isinstance(of, str)}
    for i in range(n):
        chain.watch.dys.clear()
        cotangent = torch.zeros_like(output)
        cotangent[i] = torch.rand(output.shape[1], generator=chain.generator) + 0.5
        torch.autograd.backward(output, cotangent, retain_graph=True)
        for path, owners in known.items():
            if path in chain.watch.dys:
                lead = tuple(chain.watch.dys[path].shape[:-1])
                arrangement(owners, n, lead)  # has the dimensions that it needs
                others = torch.from_numpy(spread(owners, lead) != i)
                assert not chain.watch.dys[path][others].any(), (path, i, owners)
    return {*known}


@given(
    seed=st.integers(0, 2**20),
    steps=st.lists(st.sampled_from([*STEPS]), min_size=1, max_size=8),
    end=st.sampled_from(["", "", "", "turned"]),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_moves_rows_are_given_to_their_response_or_to_none(seed: int, steps: list[str], end: str) -> None:
    claimed(Chain(seed, steps, end))


@pytest.mark.parametrize(
    "step",
    [name for name in STEPS if name not in ("put everywhere", "last for all", "written all over")],
)
def test_what_keeps_responses_apart_is_claimed(step: str) -> None:
    """In one of its ways at least; in others it mixes them."""
    assert any(["0" in claimed(Chain(seed, [step])) for seed in range(12)])  # noqa: C419 - all of them are checked


@pytest.mark.parametrize("step", ["put everywhere", "last for all", "written all over"])
def test_what_mixes_responses_is_not(step: str) -> None:
    for seed in range(12):
        chain = Chain(seed, [step])
        assert len(chain.before) == 1 or "0" not in claimed(chain)


Made = Callable[[Tensor], Tensor]
CASES: dict[
    str, tuple[Made, list[int] | None]
] = {  # of x (3, 2): owners of its rows where those of the output are 0 1 2
    "a row over another": (lambda x: _in_place(x, 0, x[1])[[0, 2]], [NOBODY, 0, 1]),
    "a row for itself and another": (lambda x: _in_place(x, 0, x[1]), None),
    "indices with a slice between them come first": (
        lambda x: x[None, :, None, None].repeat(2, 1, 2, 1, 1)[:, [0, 2, 1], :, [0, 0, 0]].sum((1, 2)),
        [0, 2, 1],
    ),
    "a loop over responses": (lambda x: torch.stack([x[i].tanh() for i in (2, 0, 1)]), [1, 2, 0]),
    "a row for two": (lambda x: torch.stack([x[0], x[1], x[0]]), None),
    "subtracted in place": (lambda x: _in_place(x, 1, x[2], -1.0), None),
}


def _in_place(x: Tensor, row: int, what: Tensor, factor: float = 0.0) -> Tensor:
    """x[row] = what, or x[row] += factor * what."""
    y = x * 1.0
    if factor:
        y[row].sub_(what)
    else:
        y[row] = what
    return y


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_layer(name: str) -> None:
    made, expected = CASES[name]
    chain = Chain(0, [])
    chain.output = made(chain.linear(torch.randn(3, 2, requires_grad=True)))
    (owners,) = survey(chain.output).calls["1"]
    assert (None if isinstance(owners, str) else owners.tolist()) == expected
    claimed(chain)


@pytest.mark.slow
def test_many_programs() -> None:
    names = [*STEPS]
    for seed in range(20_000):
        chance = torch.Generator().manual_seed(seed)
        steps = [names[k] for k in torch.randint(len(names), (1 + seed % 9,), generator=chance)]
        claimed(Chain(seed, steps, "turned" if seed % 7 == 0 else ""))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_responses_than_a_short_number_counts(dtype: torch.dtype) -> None:
    """bfloat16 has no 257."""
    x = torch.zeros(300, 2, dtype=dtype, requires_grad=True)
    y = x * 1.0
    y[::2] = torch.tanh(x)[1::2]
    found = moved(y.grad_fn, torch.arange(300).numpy(), NOBODY)
    assert found is not None
    assert found[0] is not None
    assert found[0][:, 0].tolist() == [NOBODY if i % 2 == 0 else i for i in range(300)]
    assert found[1] is not None
    assert found[1][:, 0].tolist() == list(range(0, 300, 2))
