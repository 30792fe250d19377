"""Models and batches out of the ordinary: each is right, or refused with the reason. The table is docs/supported.md."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from problems import Batch, batch, tiny_model
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import pcr_core
from pcr_core import Objective
from pcr_torch import PCR

RULE = pcr_core.PCR(alpha="snr", gate="probability")
BOTH = pytest.mark.parametrize("norms", ["fast", "loop"])
Rows = list[list[Tensor | None]]


class Output(NamedTuple):
    logits: Tensor


class Small(nn.Module):
    """Without attention: every token by itself, so that the layers can be anything."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(31, 8)
        self.layers = nn.ModuleList(layers or [nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 31)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.6)

    def forward(self, input_ids: Tensor) -> Output:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return Output(self.head(hidden))


def names_of(method: PCR) -> list[str]:
    return [name for block in method.blocks for name in block.parameters]


def contributions(
    model: nn.Module, names: list[str], logp: Tensor | list[Tensor], objective: Objective[Tensor]
) -> Iterator[Tensor]:
    """Per stream the (n, d) contributions of the responses, by plain autograd; logp may be a row a response."""
    leaves = [model.get_parameter(name) for name in names]
    for cotangent in (objective.plasticity_cotangent, objective.stability_cotangent):
        rows = []
        for i in range(len(logp)):
            row = logp[i]
            grads = torch.autograd.grad(
                row, leaves, grad_outputs=cotangent[i, : len(row)], retain_graph=True, allow_unused=True
            )
            rows.append(
                torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(leaves, grads)])
            )
        yield torch.stack(rows)


def assert_right(
    method: PCR, logp: Tensor, objective: Objective[Tensor], group_ids: Tensor, rows: Any = None, tol: float = 1e-4
) -> None:
    """Statistics and update of the method equal the dense method on plain autograd's contributions of `rows`."""
    model, names = method.model, names_of(method)
    streams = tuple(contributions(model, names, logp if rows is None else rows, objective))
    sizes = [sum(model.get_parameter(n).numel() for n in block.parameters) for block in method.blocks]
    dense = pcr_core.resolve(*streams, group_ids=group_ids, sizes=sizes, rule=method.rule)
    assert float(dense.update.norm()) > 0
    model.zero_grad()
    method.accumulate(logp, objective, group_ids=group_ids)
    report = method.resolve()
    got, expected = report.statistics, dense.statistics
    for name in ("plasticity_sq", "stability_sq", "plasticity_var", "stability_var"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name).double(), rtol=tol, atol=0.0)
    update = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
                        for p in map(model.get_parameter, names)])  # fmt: skip
    assert (update - dense.update).norm() <= tol * dense.update.norm()


def assert_batch_right(method: PCR, data: Batch, tol: float = 1e-4) -> None:
    logp = data.logp(method.model)
    assert_right(method, logp, data.objective(logp), data.group_ids, tol=tol)
    assert_right_without_noise(method, lambda: data.logp(method.model), data, tol)


def assert_right_without_noise(method: PCR, logp_of: Callable[[], Tensor], data: Batch, tol: float = 1e-4) -> None:
    """The same blocks, by automatic differentiation alone: sums of plain autograd's gradients, resolved densely."""
    model, names = method.model, names_of(method)
    leaves = [model.get_parameter(name) for name in names]
    rule = pcr_core.PCR(alpha=0.7)
    logp = logp_of()
    objective = data.objective(logp)
    cotangents = objective.plasticity_cotangent, objective.stability_cotangent
    streams = [torch.autograd.grad(logp, leaves, c, retain_graph=True, allow_unused=True) for c in cotangents]
    before = [(p, p.grad) for p in model.parameters()]
    model.zero_grad()
    plain = PCR(model, blocks=lambda name, _: name in names, rule=rule, noise_every=0)
    plain.accumulate(logp, objective, group_ids=data.group_ids)
    report = plain.resolve()
    assert report.path == "autograd"
    for name, leaf, p, s, a, b in zip(
        names, leaves, *streams, report.weights.plasticity.tolist(), report.weights.stability.tolist(), strict=True
    ):
        if p is None or s is None:
            assert leaf.grad is None, name
            continue
        c = float((p * s).double().sum())
        expected = 1 + (min(0.7 * -c / float((s * s).double().sum()), 10) if c < 0 else 0)
        assert a == 1, name
        assert b == pytest.approx(expected, rel=1e-3), name
        assert leaf.grad is not None, name
        assert (leaf.grad - (p + b * s)).norm() <= tol * leaf.grad.norm(), name
    for parameter, gradient in before:
        parameter.grad = gradient


# -- compiled models -----------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """More than the linear layer, so that something is left to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.inner(torch.cos(x)))


def whole(model: Small, backend: str) -> Any:
    return torch.compile(model, backend=backend)


def in_place(model: Small, backend: str) -> Any:
    model.compile(backend=backend)
    return model


def part(model: Small, backend: str) -> Any:
    model.layers[1] = torch.compile(model.layers[1], backend=backend)  # type: ignore[assignment]
    return model


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@BOTH
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("how", "first"), [(whole, "compile"), (whole, "PCR"), (in_place, "PCR"), (part, "compile")])
def test_compiled_models(norms: Any, backend: str, how: Callable[..., Any], first: str) -> None:
    model, data = Small(Layer(), Layer()), batch()
    if first == "compile":
        compiled = how(model, backend)
        method = PCR(compiled, blocks=r"layers.*weight", norms=norms, rule=RULE)
    else:
        method = PCR(model, blocks=r"layers.*weight", norms=norms, rule=RULE)
        compiled = how(model, backend)
    for _ in range(2):  # the second time from the compiler's cache
        logp = data.logp(compiled)
        assert_right(method, logp, data.objective(logp), data.group_ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


@pytest.mark.usefixtures("_fresh_compiler")
def test_fullgraph_says_what_to_do() -> None:
    model, data = Small(), batch()
    method = PCR(model, noise_every=1, blocks=r"layers.*weight", norms="fast")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="for fullgraph=True use norms='loop'"):
        data.logp(compiled)  # type: ignore[arg-type]
    method.remove()
    torch._dynamo.reset()
    assert_batch_right(PCR(compiled, blocks=r"layers.*weight", norms="loop", rule=RULE), data)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", [whole, in_place])
def test_fullgraph_without_noise(how: Callable[..., Any], backend: str) -> None:
    """Nothing is put into the model, and blocks have the names of the model itself."""
    model, data = Small(Layer(), Layer()), batch()
    compiled = torch.compile(model, backend=backend, fullgraph=True) if how is whole else model
    if how is in_place:
        model.compile(backend=backend, fullgraph=True)
    updates = []
    for each in (compiled, Small(Layer(), Layer())):
        method = PCR(each, blocks=r"layers.*weight", rule=pcr_core.PCR(alpha=0.7), noise_every=0)  # type: ignore[arg-type]
        assert all(block.name.startswith("layers.") for block in method.blocks)
        for _ in range(2):
            logp = data.logp(each)  # type: ignore[arg-type]
            method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
        assert method.resolve().path == "autograd"
        updates.append([p.grad for p in method.model.parameters()])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for got, expected in zip(*updates, strict=True):
        torch.testing.assert_close(got, expected)


# -- tied weights --------------------------------------------------------------------------------------------------


def test_tied_embeddings_in_a_block_take_the_loop() -> None:
    model, data = tiny_model("qwen2"), batch()
    blocks = r"embed_tokens|up_proj"
    with pytest.raises(ValueError, match=r"norms='fast' measures plain .*embed_tokens\.weight: it is tied"):
        PCR(model, noise_every=1, blocks=blocks, norms="fast")
    assert PCR(model, noise_every=1, blocks="mlp").norms == "fast"
    method = PCR(model, blocks=blocks, rule=RULE)
    assert method.norms == "mixed"
    assert [name for name, way in method.path.items() if way != "fast"] == ["model.embed_tokens.weight"]
    assert_batch_right(method, data)


def test_tied_linear_layers_take_the_loop() -> None:
    """Each layer alone would overwrite what the other measured."""
    model = Small()
    model.layers[1].weight = model.layers[0].weight
    method = PCR(model, blocks=r"layers.*weight", rule=RULE)
    assert method.norms == "loop"
    assert_batch_right(method, batch())


# -- layers that are not quite plain -----------------------------------------------------------------------------------


def twice(module: nn.Module) -> None:
    """A forward of the object's own, as accelerate's hooks set it."""
    add_hook_to_module(module, Twice())


class Twice(ModelHook):  # type: ignore[misc]
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


def tripled(module: nn.Module) -> None:
    module.forward = lambda x: 3 * nn.functional.linear(x, module.weight, module.bias)  # type: ignore[assignment, arg-type]


def anchored(module: nn.Module) -> None:
    """A parameter that its forward does not use, of the weight's shape."""
    module.anchor = nn.Parameter(module.weight.detach().clone())  # type: ignore[operator, union-attr]


def pruned(module: nn.Module) -> None:
    prune.random_unstructured(module, "weight", 0.5)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("change", [twice, tripled, anchored, pruned])
def test_a_layer_that_only_looks_plain_takes_the_loop(change: Callable[[nn.Module], None]) -> None:
    model, data = Small(), batch()
    change(model.layers[1])
    before = data.logp(model).detach()
    method = PCR(model, blocks="layers", rule=RULE)
    assert {name: way[:4] for name, way in method.path.items() if "layers.0" in name} == {
        "layers.0.weight": "fast", "layers.0.bias": "fast"
    }  # fmt: skip
    assert all(way.startswith("loop: ") for name, way in method.path.items() if name == "layers.1.weight") or (
        change is anchored
    )
    assert method.norms == "mixed"
    with pytest.raises(ValueError, match=r"norms='fast' measures plain linear layers only; layers\.1\."):
        PCR(model, noise_every=1, blocks="layers", norms="fast")
    assert_batch_right(method, data)
    method.remove()
    torch.testing.assert_close(data.logp(model).detach(), before, rtol=0.0, atol=0.0)


def test_a_forward_that_was_put_back_is_plain() -> None:
    model = Small()
    twice(model.layers[0])
    remove_hook_from_module(model.layers[0])
    assert "forward" in model.layers[0].__dict__
    method = PCR(model, blocks=r"layers.*weight", norms="fast", rule=RULE)
    assert_batch_right(method, batch())


@pytest.mark.parametrize("change", [twice, tripled])
def test_a_forward_of_its_own_outside_the_blocks_is_kept(change: Callable[[nn.Module], None]) -> None:
    model, data = Small(), batch()
    change(model.head)
    before = data.logp(model).detach()
    method = PCR(model, blocks=r"layers.*weight", norms="fast", rule=RULE)
    assert_batch_right(method, data)
    method.remove()
    assert "forward" not in model.layers[0].__dict__
    torch.testing.assert_close(data.logp(model).detach(), before, rtol=0.0, atol=0.0)


def test_a_forward_put_around_a_probe_outlives_it() -> None:
    model, data = Small(), batch()
    method = PCR(model, blocks=r"layers.*weight", norms="fast", rule=RULE)
    twice(model.head)
    changed = data.logp(model).detach()
    method.remove()
    torch.testing.assert_close(data.logp(model).detach(), changed, rtol=0.0, atol=0.0)


# -- padding and packing -------------------------------------------------------------------------------------------


def unpadded(model: nn.Module, data: Batch, left: list[int]) -> list[Tensor]:
    """logp of every response by itself, without its padding."""
    rows = []
    for i, (tokens, mask) in enumerate(zip(data.tokens, data.mask, strict=True)):
        prompt, length = data.prompt - left[i], int(mask.sum())
        tokens = tokens[left[i] : data.prompt + length]
        logits = model(input_ids=tokens[None]).logits[0, prompt - 1 : -1]
        rows.append(logits.log_softmax(-1).gather(-1, tokens[prompt:, None]).squeeze(-1))
    return rows


@BOTH
@pytest.mark.parametrize("left", [[0] * 6, [2, 1, 2, 2, 2, 1]], ids=["right", "left and right"])
def test_padding_never_contributes(norms: Any, left: list[int]) -> None:
    model, data = tiny_model("llama"), batch()
    attention = torch.cat([torch.ones(6, data.prompt, dtype=torch.bool), data.mask], dim=1)
    for i, k in enumerate(left):
        attention[i, :k] = False
    tokens = data.tokens.masked_fill(~attention, 30)
    positions = (attention.long().cumsum(-1) - 1).clamp(min=0)
    method = PCR(model, norms=norms, rule=RULE)
    logits = model(input_ids=tokens, attention_mask=attention.long(), position_ids=positions).logits
    logp = logits[:, data.prompt - 1 : -1].log_softmax(-1).gather(-1, tokens[:, data.prompt :, None]).squeeze(-1)
    assert_right(method, logp, data.objective(logp), data.group_ids, rows=unpadded(model, data, left))


def assert_refused_on_the_fast_path(model: nn.Module, data: Batch, logp_of: Callable[[], Tensor], message: str) -> None:
    method = PCR(model, noise_every=1, norms="fast")
    logp = logp_of()
    with pytest.raises(ValueError, match=message):
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
    method.remove()


def test_packed_rows_take_the_loop() -> None:
    """All responses in one row; their log-probabilities are put back into (n, T)."""
    model, data = tiny_model("llama"), batch()
    n, length = data.tokens.shape
    positions = torch.arange(length).repeat(n)[None]

    def logp() -> Tensor:
        packed = model(input_ids=data.tokens.reshape(1, -1), position_ids=positions, use_cache=False).logits
        logits = packed.reshape(n, length, -1)[:, data.prompt - 1 : -1].log_softmax(-1)
        return logits.gather(-1, data.tokens[:, data.prompt :, None]).squeeze(-1)

    message = r"input of shape \(1, 48, 24\).*expects \(6, tokens, features\)"
    assert_refused_on_the_fast_path(model, data, logp, message)
    lp = logp()
    full = [0] * 6
    whole_mask = Batch(data.tokens, torch.ones_like(data.mask), data.group_ids, data.advantages, data.prompt)
    rows = unpadded(model, whole_mask, full)
    method = PCR(model, rule=RULE)
    assert_right(method, lp := logp(), data.objective(lp), data.group_ids, rows=rows)
    assert "rows of its input are not known" in method.path["model.layers.0.mlp.up_proj.weight"]
    assert_right_without_noise(method, logp, data)
    with pytest.raises(ValueError, match=r"logp: expected a tensor \(responses, tokens\)"):
        PCR(model, noise_every=1, norms="loop").accumulate(lp.flatten(), data.objective(lp), group_ids=data.group_ids)


def put(t: Tensor, order: Tensor) -> Tensor:
    out = torch.zeros_like(t)
    out[order.argsort()] = t
    return out


@pytest.mark.parametrize("select", [lambda t, order: t[order], lambda t, order: t.index_select(0, order), put])
def test_a_batch_in_another_order_is_put_into_that_of_logp(
    select: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Sorted by length for the forward pass, and put back."""
    model, data = tiny_model("llama"), batch()
    order = data.mask.sum(1).argsort()

    def logp() -> Tensor:
        return select(data.rows(order.tolist()).logp(model), order.argsort())

    method = PCR(model, norms="fast", rule=RULE)
    lp = logp()
    assert_right(method, lp, data.objective(lp), data.group_ids)
    assert set(method.path.values()) == {"fast"}


# -- frozen parameters ---------------------------------------------------------------------------------------------


@BOTH
def test_the_lower_half_frozen(norms: Any) -> None:
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0." not in name and "embed" not in name)
    method = PCR(model, norms=norms, rule=RULE)
    assert len(names_of(method)) == 3
    assert_batch_right(method, batch())
    assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())


@BOTH
def test_a_frozen_bias_inside_a_probed_layer(norms: Any) -> None:
    model = Small()
    bias = model.layers[0].bias
    assert isinstance(bias, nn.Parameter)
    bias.requires_grad_(False)
    method = PCR(model, blocks="layers", norms=norms, rule=RULE)
    assert "layers.0.bias" not in names_of(method)
    assert_batch_right(method, batch())
    assert bias.grad is None


@BOTH
def test_frozen_and_thawed_after_PCR_was_made(norms: Any) -> None:
    """A block's parameter: refused. Any other: as autograd has it."""
    model, data = Small(), batch()
    model.embed.requires_grad_(False)
    method = PCR(model, blocks=r"layers.*weight", norms=norms, rule=RULE)
    model.embed.requires_grad_(True)
    model.head.requires_grad_(False)
    assert_batch_right(method, data)
    assert model.head.weight.grad is None
    got = model.embed.weight.grad
    logp = data.logp(model)
    objective = data.objective(logp)
    total = (objective.plasticity_loss + objective.stability_loss).sum()
    torch.testing.assert_close(got, torch.autograd.grad(total, [model.embed.weight])[0])
    model.layers[1].requires_grad_(False)
    logp = data.logp(model)
    with pytest.raises(ValueError, match=r"layers\.1\.weight is in a block and was frozen after PCR"):
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)


# -- layers that are not used --------------------------------------------------------------------------------------


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(8, 8), nn.Linear(8, 8)
        self.taken = True

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.yes(x) if self.taken else self.no(x)
        return out


@BOTH
def test_a_branch_not_taken(norms: Any) -> None:
    """In one micro-batch: the other counts alone. In none of them: no gradient, as after a plain backward."""
    branch = Branch()
    model, data = Small(branch), batch()
    method = PCR(model, noise_every=1, blocks=r"yes.weight|no.weight", norms=norms, rule=pcr_core.GRPO())
    assert_batch_right(method, data)
    assert branch.no.weight.grad is None
    (index,) = [b for b, block in enumerate(method.blocks) if block.name == "layers.0.no.weight"]
    expected = []
    for taken in (True, False):
        branch.taken = taken
        model.zero_grad()
        logp = data.logp(model)
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
        alone = method.resolve()
        weight = branch.yes.weight if taken else branch.no.weight
        assert weight.grad is not None
        expected.append((weight.grad.clone(), alone.statistics.plasticity_var))
    model.zero_grad()
    for taken in (True, False):
        branch.taken = taken
        logp = data.logp(model)
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
    report = method.resolve()
    assert report.finite
    torch.testing.assert_close(branch.yes.weight.grad, expected[0][0])
    torch.testing.assert_close(branch.no.weight.grad, expected[1][0])
    assert expected[0][1][index] == 0
    torch.testing.assert_close(report.statistics.plasticity_var, expected[0][1] + expected[1][1])


# -- mixtures of experts -------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Top-1 of three experts on the tokens sent to each; the last gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        scores = self.router(flat).softmax(-1)
        chosen = scores[:, :2].argmax(-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            at = (chosen == e).nonzero().flatten()
            if len(at):
                out = out.index_add(0, at, expert(flat[at]) * scores[at, e, None])
        return out.view_as(x)


def test_routed_linear_experts_are_measured_by_the_owners_of_their_tokens() -> None:
    model, data = Small(Routed()), batch()
    method = PCR(model, norms="fast", rule=RULE)
    assert [name for name in names_of(method) if "router" in name] == []
    assert_batch_right(method, data)
    idle = model.get_parameter("layers.0.experts.2.weight")
    assert idle.grad is None
    assert model.get_parameter("layers.0.router.weight").grad is not None


def test_fused_experts_of_transformers_take_the_loop() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=31, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1, num_local_experts=6, num_experts_per_tok=1,
                           router_jitter_noise=0.0)  # fmt: skip
    model, data = MixtralForCausalLM(config), batch()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
        router = next(m for name, m in model.named_modules() if name.endswith("mlp.gate"))
        router.weight[4:] = 0  # a score of 0 among random ones; the last expert loses every tie
    method = PCR(model, rule=RULE)  # type: ignore[arg-type]
    assert method.norms == "loop"
    assert all(".experts." in name for name in names_of(method)), "the router is not a block"
    assert_batch_right(method, data)
    idle = [(p.grad == 0).flatten(1).all(1) for p in map(model.get_parameter, names_of(method))]  # type: ignore[union-attr]
    assert all(bool(experts.any()) and not bool(experts.all()) for experts in idle), "one expert must be idle"


# -- recomputation, dropout, precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_dropout_with_checkpointing(reentrant: bool, autocast: bool) -> None:
    """The recomputation must draw the same masks, in both backward passes."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    )
    model.train()
    data = batch()

    def pull(norms: Any) -> tuple[Any, dict[str, Tensor]]:
        method = PCR(model, norms=norms, rule=RULE)  # type: ignore[arg-type]
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logp = data.logp(model)  # type: ignore[arg-type]
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
        report = method.resolve()
        method.remove()
        return report, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, expected = pull("loop")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        report, got = pull("fast")
    tolerance = 0.03 if autocast else 1e-4
    torch.testing.assert_close(
        report.statistics.plasticity_var, plain.statistics.plasticity_var, rtol=tolerance, atol=0.0
    )
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= tolerance * gradient.norm(), name


# -- other passes in between ---------------------------------------------------------------------------------------


@BOTH
def test_forward_passes_between_logp_and_accumulate_change_nothing(norms: Any) -> None:
    model, data, other = tiny_model("llama"), batch(), batch(n=4, length=7, seed=9)
    method = PCR(model, norms=norms, rule=RULE)
    logp = data.logp(model)
    with torch.no_grad():
        other.logp(model)
    model.eval()
    other.logp(model)
    model.train()
    assert_right(method, logp, data.objective(logp), data.group_ids)


def test_reentrant_checkpointing_is_refused_in_the_loop() -> None:
    """By torch itself: this kind of checkpointing has no gradients but those of backward()."""
    model, data = tiny_model("llama"), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
        model.train()
        method = PCR(model, noise_every=1, norms="loop")
        logp = data.logp(model)
        with pytest.raises(RuntimeError, match="use_reentrant"):
            method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
    with pytest.raises(RuntimeError, match="discard"):
        method.resolve()
