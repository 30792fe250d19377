"""PCR on two processes against one: DDP, FSDP2, LoRA, accumulation, checkpointing, priors, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import distributed_cases
import pytest
import torch
from distributed_cases import EXPECTED
from worlds import run_world

BFLOAT16 = "fsdp in bfloat16"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Results of all cases by rank: one start of two processes for the file."""
    return run_world(distributed_cases.run_cases, tmp_path_factory.mktemp("world"))


def assert_equal(got: dict[str, Any], expected: dict[str, Any], rtol: float) -> None:
    assert got["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        error = (got["gradients"][name].double() - gradient.double()).norm()
        assert error <= rtol * gradient.double().norm(), name
    mine, theirs = got["statistics"], expected["statistics"]
    products = torch.stack([theirs.plasticity_sq, theirs.stability_sq])
    for field in fields(mine):
        if getattr(theirs, field.name) is None:
            assert getattr(mine, field.name) is None
            continue
        scale = products.prod(0).sqrt() if field.name in ("dot", "covariance") else 0
        bound = rtol * torch.maximum(getattr(theirs, field.name).abs(), torch.as_tensor(scale))
        error = (getattr(mine, field.name) - getattr(theirs, field.name)).abs()
        assert bool((error <= bound).all()), (field.name, error / bound * rtol)


@pytest.mark.parametrize("name", EXPECTED)
def test_two_processes_equal_one(name: str, ranks: list[Any]) -> None:
    expected = EXPECTED[name]()
    for results in ranks:
        assert_equal(results[name], expected, rtol=4e-2 if name == BFLOAT16 else 2e-6)
        assert results[name]["placed"]


@pytest.mark.parametrize("name", [name for name in EXPECTED if "ddp" in name])
def test_ranks_agree_bit_for_bit(name: str, ranks: list[Any]) -> None:
    one, other = (results[name] for results in ranks)
    for field in fields(one["statistics"]):
        mine, theirs = (getattr(each["statistics"], field.name) for each in (one, other))
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    assert all(torch.equal(one["gradients"][key], other["gradients"][key]) for key in one["gradients"])


def test_unused_parameters(ranks: list[Any]) -> None:
    """Used on one rank: half of its gradient, zeros elsewhere; used on none: no gradient."""
    for results in ranks:
        names = results["experts"]["gradients"].keys()
        assert {"expert.0.weight", "expert.1.weight", "other.0.bias", "other.1.bias"} < names
        assert not any(".2." in name for name in names)


def test_states_are_sharded_like_the_model(ranks: list[Any]) -> None:
    for results in ranks:
        assert all(results["temporal, fsdp"]["sharded"])
        assert not any(results["temporal, ddp"]["sharded"])


def test_nothing_to_resolve_on_any_rank_is_an_error_on_all(ranks: list[Any]) -> None:
    for results in ranks:
        assert "before accumulate" in results["a rank without data"]["error"]


def test_ddp_gets_its_own_reduction_back(ranks: list[Any]) -> None:
    for results in ranks:
        assert results["ddp, first micro-batch not synchronised"]["synchronises"] == (False, True)


def test_collectives_do_not_grow_with_blocks(ranks: list[Any]) -> None:
    for results in ranks:
        counts = results["collectives"]["counts"]
        assert {name: len(sizes) for name, sizes in counts.items()} == {
            "ddp tensor": 3,  # which gradients there are, one bucket of them, statistics
            "ddp global": 3,
            "fsdp tensor": 2,  # statistics, and whether what is written is finite, of which each rank sees its part
            "fsdp global": 2,
        }
        assert counts["fsdp tensor"] == [6 * 6, 6]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sharded after", "is not the parameter that PCR"),
        ("used beside", "got a gradient that the fast path did not see"),
        ("not wrapped", "it is not wrapped, but a process group of 2 ranks"),
        ("second group", "process_group: DistributedDataParallel brings its own"),
        ("second group of shards", "process_group: a sharded model brings its own"),
        ("static graph", "static_graph=True"),
        ("fsdp1", "FSDP1"),
        ("tensor parallel", "tensor parallel is not supported"),
        ("loop", "norms='loop' differentiates by whole weights"),
        ("not linear", "embed_tokens.weight"),
        ("foreign state", "not sharded as this model"),
    ],
)
def test_refusals_give_the_reason(what: str, message: str, ranks: list[Any]) -> None:
    for results in ranks:
        assert message in results["refusals"]["refused"][what]
