"""What the ranks of `test_distributed.py` run: the same small problems whole on one process and split over two.

Twelve responses in three groups; the second group straddles the ranks, so one process is given its parts as two strata.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from problems import Batch, tiny_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import pcr_core
from pcr_torch import PCR, distributed

GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
STRATA = torch.tensor([0, 0, 0, 0, 1, 1, 9, 9, 2, 2, 2, 2])  # of the same responses, the straddling group cut
ROWS = (range(0, 6), range(6, 12))
PARTS = ((range(0, 4), range(4, 6)), (range(6, 8), range(8, 12)))
RULE = pcr_core.PCR(alpha="snr")
WITHOUT = {"rule": pcr_core.PCR(alpha=0.7), "noise_every": 0}
TEMPORAL = pcr_core.PCR(alpha="variance", prior=pcr_core.TemporalPrior(0.7))


def problem(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(31, (12, 8), generator=generator)
    mask = torch.rand(12, 5, generator=generator) < 0.8
    mask[:, 0] = True
    return Batch(tokens, mask, GROUPS, torch.randn(12, generator=generator), 3)


def accumulate(
    method: PCR, model: nn.Module, rows: Sequence[int], ids: Tensor, share: float = 1, seed: int = 0
) -> None:
    """Rows of the global batch, normalised by `share` of its tokens."""
    data, generator = problem(seed), torch.Generator().manual_seed(5)
    noise = [s * torch.randn(data.mask.shape, generator=generator) for s in (0.2, 0.5)]
    index = list(rows)
    part = data.rows(index)
    logp = part.logp(model)
    objective = pcr_core.grpo_objective(
        logp,
        logp.detach() + noise[0][index].to(logp.dtype),
        logp.detach() + noise[1][index].to(logp.dtype),
        part.advantages.to(logp.dtype),
        part.mask,
        beta=0.1,
        normalization="dapo",
        normalizer=share * float(data.mask.sum()),
    )
    method.accumulate(logp, objective, group_ids=ids[index])


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def outcome(model: nn.Module, report: Any) -> dict[str, Any]:
    names = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    return {
        "gradients": {name: whole(p.grad).detach() for name, p in names.items() if p.grad is not None},
        "statistics": report.statistics,
        "placed": all(
            isinstance(p.grad, DTensor) == isinstance(p, DTensor)
            and (not isinstance(p, DTensor) or p.grad.placements == p.placements)  # type: ignore[union-attr]
            for p in names.values()
            if p.grad is not None
        ),
    }


def alone(model: nn.Module, rule: Any = RULE, **options: Any) -> dict[str, Any]:
    """Everything in one process."""
    method = PCR(model, rule=rule, **options)
    accumulate(method, model, range(12), STRATA)
    return outcome(model, method.resolve())


def split(rank: int, model: nn.Module, parts: Sequence[Any] = (), rule: Any = RULE, **options: Any) -> dict[str, Any]:
    """This rank's rows, in one micro-batch or in several."""
    method = PCR(model, rule=rule, **options)
    for rows in parts or (ROWS[rank],):
        accumulate(method, model, rows, GROUPS, 0.5)
    return outcome(model, method.resolve())


def ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options)


def fsdp(model: nn.Module, **options: Any) -> nn.Module:
    """Layers and the rest sharded, as is usual."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, **options)  # type: ignore[arg-type]
    return fully_shard(model, **options)


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    if reentrant:
        model.enable_input_require_grads()  # type: ignore[operator]
    return model.train()


Run = Callable[[int], dict[str, Any]]
CASES: dict[str, Run] = {}  # what each rank does
EXPECTED: dict[str, Callable[[], dict[str, Any]]] = {}  # the same on one process, without torch.distributed


def case(name: str, expected: Callable[[], dict[str, Any]] | None = None) -> Callable[[Run], Run]:
    def add(run: Run) -> Run:
        CASES[name] = run
        if expected is not None:
            EXPECTED[name] = expected
        return run

    return add


def pair(
    name: str,
    wrap: Callable[[nn.Module], nn.Module],
    make: Callable[[], nn.Module],
    parts: bool = False,
    **options: Any,
) -> None:
    """A model wrapped on two processes, against one."""
    case(name, lambda: alone(make(), **options))(
        lambda rank: split(rank, wrap(make()), PARTS[rank] if parts else (), **options)
    )


def llama() -> nn.Module:
    return tiny_model("llama")


def lora() -> nn.Module:
    return tiny_model("llama", lora=True)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": ddp,
    "fsdp": lambda model: fsdp(model, reshard_after_forward=True),
    "fsdp kept": lambda model: fsdp(model, reshard_after_forward=False),
}
for _name, _wrap in WRAPPERS.items():
    pair(_name, _wrap, llama)
    pair(f"{_name}, two micro-batches", _wrap, llama, parts=True)
    pair(f"{_name}, checkpointed", _wrap, lambda: checkpointed(llama(), reentrant=False), parts=True)
    pair(f"{_name}, reentrant", _wrap, lambda: checkpointed(llama(), reentrant=True))
    pair(f"{_name}, without noise", _wrap, llama, parts=True, **WITHOUT)
    pair(f"{_name}, without noise, checkpointed", _wrap, lambda: checkpointed(llama(), reentrant=False), **WITHOUT)
    pair(f"{_name}, without noise, reentrant", _wrap, lambda: checkpointed(llama(), reentrant=True), **WITHOUT)
pair("ddp, lora", ddp, lora)
pair("fsdp, lora", WRAPPERS["fsdp"], lora, parts=True)
pair("ddp, unused looked for", lambda model: ddp(model, find_unused_parameters=True), llama)
pair("ddp, gradients in buckets", lambda model: ddp(model, gradient_as_bucket_view=True), llama)
for _shape in ((2, 1), (1, 2)):
    pair(
        f"hybrid {_shape}",
        lambda model, shape=_shape: fsdp(  # type: ignore[misc]
            model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        ),
        llama,
    )


@case("copies without a wrapper, loop", lambda: alone(llama(), norms="loop"))
def _(rank: int) -> dict[str, Any]:
    return split(rank, llama(), process_group=dist.group.WORLD, norms="loop")


@case("fsdp, first micro-batch not synchronised", lambda: alone(llama()))
def _(rank: int) -> dict[str, Any]:
    model = WRAPPERS["fsdp"](llama())
    method = PCR(model, rule=RULE)
    for last, rows in zip((False, True), PARTS[rank]):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        accumulate(method, model, rows, GROUPS, 0.5)
    return outcome(model, method.resolve())


@case("ddp, first micro-batch not synchronised", lambda: alone(llama()))
def _(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(llama())
    method = PCR(model, rule=RULE)
    with model.no_sync():
        accumulate(method, model, PARTS[rank][0], GROUPS, 0.5)
    accumulate(method, model, PARTS[rank][1], GROUPS, 0.5)
    got = outcome(model, method.resolve())
    off = model.require_backward_grad_sync
    method.remove()
    return got | {"synchronises": (off, model.require_backward_grad_sync)}


@case("ddp, without noise, the ranks keep different sums", lambda: _uneven(llama(), (0, 1), 1))
def _(rank: int) -> dict[str, Any]:
    return _uneven(ddp(llama()), (rank,), 0.5)


def _uneven(model: nn.Module, which: Sequence[int], share: float) -> dict[str, Any]:
    """Streams of which the larger is another in each half of the batch."""
    method = PCR(model, **WITHOUT)
    data = problem()
    for half in which:
        part = data.rows(list(ROWS[half]))
        logp = part.logp(model)
        p, s = part.advantages[:, None].expand_as(logp) / share, logp.detach() / share
        sizes = (1e-2, 1) if half else (1, 1e-2)
        method.accumulate_cotangents(logp, sizes[0] * p, sizes[1] * s, group_ids=part.group_ids)
    return outcome(model, method.resolve())


@case("a group of one on one rank", lambda: _lonely(llama(), (0, 1), 1))
def _(rank: int) -> dict[str, Any]:
    return _lonely(ddp(llama()), (rank,), 0.5)


@case("a group of one on one rank, fsdp", lambda: _lonely(llama(), (0, 1), 1))
def _(rank: int) -> dict[str, Any]:
    return _lonely(WRAPPERS["fsdp"](llama()), (rank,), 0.5)


def _lonely(model: nn.Module, which: Sequence[int], share: float) -> dict[str, Any]:
    """One rank could measure the noise and the other could not, in the first step and in one more."""
    method = PCR(model, rule=pcr_core.PCR(alpha=0.7))
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7])
    for _ in range(2):
        for half in which:
            accumulate(method, model, ROWS[half], ids, share)
        report = method.resolve()
        found = outcome(model, report)
        model.zero_grad()
    assert report.path == "autograd"
    return found


@case("fsdp in bfloat16", lambda: alone(llama().to(torch.bfloat16)))
def _(rank: int) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return split(rank, fsdp(llama(), mp_policy=policy), PARTS[rank])


def _twice(method: PCR, model: nn.Module, rows: Any, ids: Tensor, share: float) -> dict[str, Any]:
    """A .grad that is there before resolve is averaged too; a second resolve leaves averages alone."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, sum(rows) / 66 / share)  # 1 in the mean
    for _ in range(2):
        accumulate(method, model, rows, ids, share)
        report = method.resolve()
    return outcome(model, report)


@case("further losses", lambda: _twice(PCR(m := llama(), rule=RULE), m, range(12), STRATA, 1))
def _(rank: int) -> dict[str, Any]:
    model = ddp(llama())
    return _twice(PCR(model, rule=RULE), model, ROWS[rank], GROUPS, 0.5)


class Experts(nn.Module):
    """A block that only some ranks use, one that none uses, and the same outside the blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(31, 6)
        self.expert = nn.ModuleList(nn.Linear(6, 8, bias=False) for _ in range(3))
        self.other = nn.ModuleList(nn.Linear(8, 31) for _ in range(3))

    def forward(self, tokens: Tensor, which: int) -> Tensor:
        logits: Tensor = self.other[which](torch.tanh(self.expert[which](self.embed(tokens))))
        return logits


def _use(method: PCR, model: nn.Module, which: Sequence[int], share: float) -> dict[str, Any]:
    data = problem()
    for expert in which:
        index = list(ROWS[expert])
        tokens, advantages = data.tokens[index], data.advantages[index]
        logp = model(tokens, expert).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        plasticity = (advantages[:, None] / share).expand_as(logp)
        method.accumulate_cotangents(logp, plasticity, logp.detach() / share, group_ids=GROUPS[index])
    return outcome(model, method.resolve())


@case("experts", lambda: _use(PCR(m := Experts(), blocks="expert", rule=RULE), m, (0, 1), 1))
def _(rank: int) -> dict[str, Any]:
    model = ddp(Experts())
    return _use(PCR(model, blocks="expert", rule=RULE), model, (rank,), 0.5)


@case("ddp, small buckets", lambda: alone(llama()))
def _(rank: int) -> dict[str, Any]:
    """Some tensors larger than a bucket, some that share one."""
    usual, distributed.BUCKET_BYTES = distributed.BUCKET_BYTES, 2000
    try:
        return split(rank, ddp(llama()))
    finally:
        distributed.BUCKET_BYTES = usual


@case("a rank without data", lambda: alone(llama()))
def _(rank: int) -> dict[str, Any]:
    model = ddp(llama())
    method = PCR(model, rule=RULE)
    if rank == 0:
        accumulate(method, model, range(12), STRATA, 0.5)
    got = outcome(model, method.resolve())
    try:
        method.resolve()
    except RuntimeError as error:
        return got | {"error": str(error)}
    raise AssertionError("resolve() with no data on any rank")


def _steps(method: PCR, model: nn.Module, rows: Any, ids: Tensor, share: float, seeds: range) -> dict[str, Any]:
    for seed in seeds:
        model.zero_grad()
        accumulate(method, model, rows, ids, share, seed=seed)
        report = method.resolve()
    return outcome(model, report)


def _restored(rank: int, wrap: Callable[[nn.Module], nn.Module], *, gathered: bool) -> dict[str, Any]:
    """Three steps with a temporal prior; saved after two, and continued in another object."""
    model = wrap(llama())
    method = PCR(model, rule=TEMPORAL)
    _steps(method, model, ROWS[rank], GROUPS, 0.5, range(2))
    state = copy.deepcopy(method.state_dict())
    sharded = [isinstance(m, DTensor) for kept in state["prior"].values() for m in kept["mean"].values()]
    if gathered:
        for kept in state["prior"].values():
            kept["mean"] = {name: whole(mean) for name, mean in kept["mean"].items()}
    method.remove()
    method = PCR(model, rule=TEMPORAL)
    method.load_state_dict(state)
    return _steps(method, model, ROWS[rank], GROUPS, 0.5, range(2, 3)) | {"sharded": sharded}


def _uninterrupted() -> dict[str, Any]:
    return _steps(PCR(m := llama(), rule=TEMPORAL), m, range(12), STRATA, 1, range(3))


case("temporal, ddp", _uninterrupted)(lambda rank: _restored(rank, ddp, gathered=False))
case("temporal, fsdp", _uninterrupted)(lambda rank: _restored(rank, WRAPPERS["fsdp"], gathered=False))
case("temporal, fsdp gathered", _uninterrupted)(lambda rank: _restored(rank, WRAPPERS["fsdp"], gathered=True))


@contextmanager
def counted() -> Iterator[list[int]]:
    """Sizes of all-reduces, as they are called."""
    sizes: list[int] = []
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        dist.all_reduce = original


@case("collectives")
def _(rank: int) -> dict[str, Any]:
    """All-reduces of a resolve, by wrapper and by granularity."""
    counts = {}
    for name in ("ddp", "fsdp"):
        for granularity in ("tensor", "global"):
            model = WRAPPERS[name](llama())
            method = PCR(model, granularity=granularity)  # type: ignore[arg-type]
            accumulate(method, model, ROWS[rank], GROUPS, 0.5)
            with counted() as sizes:
                method.resolve()
            counts[f"{name} {granularity}"] = sizes
    return {"counts": counts}


@case("refusals")
def _(rank: int) -> dict[str, Any]:
    """What is refused, by the words of the refusal."""
    mesh = init_device_mesh("cpu", (2,))
    early = llama()
    before = PCR(early, process_group=dist.group.WORLD)
    fsdp(early)
    state = {"prior": None, "blocks": [b.name for b in before.blocks]}
    foreign = distribute_tensor(torch.zeros(24, 16), mesh, [Shard(1)])
    name = before.blocks[0].name
    parallel = parallelize_module(llama(), mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})
    sharded = fsdp(llama())
    beside = fsdp(llama())
    seen = PCR(beside, noise_every=1)
    accumulate(seen, beside, ROWS[rank], GROUPS)
    seen.resolve()  # leaves a .grad, so that the next is added in place
    up = beside.get_submodule("model.layers.0.mlp.up_proj")
    up.register_forward_hook(lambda module, _, y: y + 0 * module.weight.sum())
    attempts: dict[str, Callable[[], Any]] = {
        "used beside": lambda: accumulate(seen, beside, ROWS[rank], GROUPS),
        "sharded after": lambda: accumulate(before, early, ROWS[rank], GROUPS),
        "not wrapped": lambda: PCR(llama()),
        "second group": lambda: PCR(ddp(llama()), process_group=dist.group.WORLD),
        "second group of shards": lambda: PCR(sharded, process_group=dist.group.WORLD),
        "static graph": lambda: PCR(ddp(llama(), static_graph=True)),
        "fsdp1": lambda: PCR(FullyShardedDataParallel(llama(), device_id=torch.device("cpu"))),
        "tensor parallel": lambda: PCR(parallel),
        "loop": lambda: PCR(sharded, norms="loop", noise_every=1),
        "not linear": lambda: PCR(sharded, blocks="embed_tokens", noise_every=1),
        "foreign state": lambda: PCR(sharded).load_state_dict(
            state | {"prior": {"plasticity": {"mean": {name: foreign}, "variance": torch.ones(6)}}}
        ),
    }
    return {"refused": {key: _refusal(attempt) for key, attempt in attempts.items()}}


def _refusal(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return "nothing"


def run_cases(rank: int) -> dict[str, Any]:
    return {name: function(rank) for name, function in CASES.items()}
