"""Gradients of both streams by automatic differentiation alone, for rules that need no noise."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from problems import ARCHITECTURES, batch, tiny_model
from steps import gradients
from test_streams import cotangents_of
from torch import Tensor, nn

import pcr_core
from pcr_torch import PCR
from pcr_torch.graph.segments import segments
from pcr_torch.totals import part, pull_totals

RULE = pcr_core.PCR(alpha=0.7)


def plain(model: nn.Module, logp: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Of an ordinary backward pass, by parameter."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(logp, list(parameters.values()), cotangent, retain_graph=True, allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def assert_streams(model: nn.Module, logp_of: Callable[[], Tensor], blocks: str = "mlp", kind: str = "ordinary") -> Any:
    """`pull_totals` against plain backward passes: the sum's gradients are theirs, bit for bit."""
    method = PCR(model, blocks=blocks, noise_every=0)
    parameters = {name: p for name, p in model.named_parameters() for b in method.blocks if name in b.parameters}
    cotangents = cotangents_of(kind)
    logp = logp_of()
    p, s, both = (plain(model, logp, c) for c in (*cotangents, sum(cotangents)))
    streams: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    held = pull_totals(logp, cotangents, parameters, streams)
    outside = gradients(model)
    assert outside.keys() == both.keys() - parameters.keys()
    for name, gradient in outside.items():
        if held is None:  # two passes, in which each stream is rounded by itself
            torch.testing.assert_close(gradient, both[name], rtol=1e-5, atol=1e-5 * float(both[name].abs().max()))
        else:
            assert torch.equal(gradient, both[name]), name
    for stream, expected in enumerate((p, s)):
        assert streams[stream].keys() == expected.keys() & parameters.keys()
        for name, gradient in streams[stream].items():
            if stream == held:
                assert torch.equal(gradient, both[name]), name
                gradient = gradient - streams[1 - stream][name]
            assert (gradient - expected[name]).norm() <= 2e-5 * expected[name].norm() + 1e-30, (name, stream)
    model.zero_grad()
    return held


@pytest.mark.parametrize("checkpointing", ["none", "not reentrant", "reentrant"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streams_are_those_of_two_backward_passes(architecture: str, checkpointing: str) -> None:
    model: Any = tiny_model(architecture)
    if checkpointing != "none":
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if checkpointing == "reentrant":
        model.enable_input_require_grads()
        with pytest.raises(RuntimeError, match="use_reentrant"):  # so that nothing but .grad tells the gradients
            plain(model, batch().logp(model), cotangents_of("ordinary")[0])
        _assert_update(model, "mlp")
        return
    assert assert_streams(model, lambda: batch().logp(model)) is not None


def _assert_update(model: nn.Module, blocks: str, tolerance: float = 1e-5) -> None:
    """An update without noise against the loop's, in .grad of every parameter, in two microbatches."""
    updates = []
    for options in ({"noise_every": 0}, {"noise_every": 1, "norms": "loop"}):
        mine = model if options["noise_every"] == 0 else _plainly(model)
        method = PCR(mine, blocks=blocks, rule=RULE, **options)  # type: ignore[arg-type]
        for _ in range(2):
            data = batch()
            logp = data.logp(mine)
            method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
        report = method.resolve()
        assert report.path == ("autograd" if options["noise_every"] == 0 else "loop")
        assert (report.statistics.covariance is None) == (options["noise_every"] == 0)
        method.remove()
        updates.append(gradients(mine))
        mine.zero_grad()
    assert updates[0].keys() == updates[1].keys()
    for name, gradient in updates[1].items():
        assert (updates[0][name] - gradient).norm() <= tolerance * gradient.norm() + 1e-12, name


def _plainly(model: Any) -> Any:
    """The same model without checkpointing."""
    twin = copy.deepcopy(model)
    if getattr(twin, "is_gradient_checkpointing", False):
        twin.gradient_checkpointing_disable()
    return twin


@pytest.mark.parametrize("blocks", ["mlp", "all", r"layers\.1\.mlp", "lm_head|embed", "norm"])
def test_updates_are_those_of_the_loop_whatever_the_blocks(blocks: str) -> None:
    _assert_update(tiny_model("llama"), blocks)


@pytest.mark.parametrize("kind", ["ordinary", "cancelling", "nearly", "far apart", "one at a time", "no stability"])
def test_streams_keep_their_digits_whatever_the_other_is(kind: str) -> None:
    model = tiny_model("llama")
    assert_streams(model, lambda: batch().logp(model), kind=kind)


def test_the_smaller_stream_is_the_one_taken_alone() -> None:
    model, data = tiny_model("llama"), batch()
    parameters = {n: p for n, p in model.named_parameters() if "mlp" in n}
    p, s = cotangents_of("ordinary")
    assert pull_totals(data.logp(model), (p, 1e-3 * s), parameters, ({}, {})) == 0
    assert pull_totals(data.logp(model), (1e-3 * p, s), parameters, ({}, {})) == 1


def test_streams_of_all_microbatches_keep_their_digits() -> None:
    """No reward tells the first one's responses apart; of another one the larger stream is the smaller of all."""
    model, data = tiny_model("llama"), batch()
    p, s = cotangents_of("ordinary")
    parts = [(0 * p, 1e-4 * s), (p, 1e-4 * s), (1e-6 * p, 1e-4 * s)]
    parameters = {n: q for n, q in model.named_parameters() if "mlp" in n}
    totals: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    joined = None
    for k, cotangents in enumerate(parts):
        joined = pull_totals(data.logp(model), cotangents, parameters, totals, joined=joined, fresh=k == 0)
    assert joined == 0
    part(totals, joined)
    exact = tiny_model("llama", dtype=torch.float64)
    logp = data.logp(exact)
    for stream, found in enumerate(totals):
        expected = plain(exact, logp, sum(each[stream] for each in parts))
        for name, gradient in found.items():
            assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), (stream, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_conflict_the_update_is_the_plain_gradient_bit_for_bit(dtype: torch.dtype) -> None:
    """Of several microbatches too, but that halves are summed in float32."""
    model, data = tiny_model("llama", dtype=dtype), batch()
    p = cotangents_of("ordinary")[0]
    method = PCR(model, noise_every=0)
    parts = 3 if dtype == torch.float32 else 1
    for _ in range(parts):
        data.logp(model).backward(p + 0.5 * p)
    expected = gradients(model)
    model.zero_grad()
    for _ in range(parts):
        method.accumulate_cotangents(data.logp(model), p, 0.5 * p, group_ids=data.group_ids)
    report = method.resolve()
    assert not report.weights.conflict.any()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


def test_gradients_that_are_there_are_added_to() -> None:
    model, data = tiny_model("llama"), batch()
    before = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = before[name].clone()
    method = PCR(model, rule=RULE, noise_every=0)
    logp = data.logp(model)
    method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
    method.resolve()
    got = gradients(model)
    model.zero_grad()
    logp = data.logp(model)
    method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
    method.resolve()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(got[name], before[name] + gradient)


def test_a_group_of_one_response_is_no_obstacle() -> None:
    model, data = tiny_model("llama"), batch()
    method = PCR(model, noise_every=0)
    logp = data.logp(model)
    method.accumulate(logp, data.objective(logp), group_ids=torch.arange(6))
    assert method.resolve().path == "autograd"


@pytest.mark.parametrize("order", ["joined first", "apart first", "both ways"])
def test_microbatches_may_differ_in_what_is_kept(order: str) -> None:
    """A hook appears, or streams of their own forward passes come, within a step."""
    data = batch()

    def update(tier: dict[str, Any], way: str) -> dict[str, Tensor]:
        model = tiny_model("llama")
        method = PCR(model, rule=RULE, **tier)
        p, s = cotangents_of("ordinary")

        def together() -> None:
            method.accumulate_cotangents(data.logp(model), p, s, group_ids=data.group_ids)

        def by_themselves() -> None:
            method.accumulate_plasticity(data.logp(model), p, group_ids=data.group_ids)
            method.accumulate_stability(data.logp(model), s, group_ids=data.group_ids)

        def other_way() -> None:
            method.accumulate_cotangents(data.logp(model), 1e-3 * p, s, group_ids=data.group_ids)

        jobs = {"joined first": (together, by_themselves), "apart first": (by_themselves, together),
                "both ways": (together, other_way)}  # fmt: skip
        for job in jobs[way]:
            job()
        method.resolve()
        return gradients(model)

    got, expected = update({"noise_every": 0}, order), update({"noise_every": 1, "norms": "loop"}, order)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_hooks_on_block_parameters_act_on_each_stream() -> None:
    def hooked() -> nn.Module:
        model = tiny_model("llama")
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.register_hook(lambda g: g * 2)
        return model

    model, data = hooked(), batch()
    method = PCR(model, rule=pcr_core.GRPO(), noise_every=0)
    logp = data.logp(model)
    method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
    method.resolve()
    expected = hooked()
    logp = data.logp(expected)
    objective = data.objective(logp)
    (objective.plasticity_loss + objective.stability_loss).sum().backward()
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-5, atol=1e-6)


def test_hooks_on_activations_act_once_on_a_gradient() -> None:
    """Also on the tensor at which a segment ends."""
    model: Any = tiny_model("llama")

    def double(module: Any, args: Any, output: Any) -> None:
        (output if isinstance(output, Tensor) else output[0]).register_hook(lambda g: 2 * g)

    for layer in model.model.layers:
        layer.register_forward_hook(double)
    assert_streams(model, lambda: batch().logp(model), blocks="all")
    assert_streams(model, lambda: batch().logp(model))


def test_segments_end_above_and_below_the_blocks() -> None:
    model: Any = tiny_model("llama")
    leaves = {id(p) for n, p in model.named_parameters() if "layers.1.mlp" in n}
    chain = segments(batch().logp(model), leaves)
    assert chain is not None
    head, inside, below = chain
    assert id(model.lm_head.weight) in head.leaves
    assert head.below  # one pass serves both streams there
    assert {id(leaf) for leaf in inside.tensors} == leaves
    assert id(model.model.layers[0].mlp.up_proj.weight) in below.leaves
    assert not below.tensors


MODELS = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3 moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
    "opt": (transformers.OPTConfig, {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "falcon": (transformers.FalconConfig, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_that_no_probe_can_measure(name: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, options = MODELS[name]
    small = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**small | options))
    with caplog.at_level(logging.WARNING):
        _assert_update(model, "mlp", 1e-4)
        caplog.clear()
        method = PCR(model)
        data = batch()
        logp = data.logp(model)
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
        report = method.resolve()
    assert report.path == ("autograd" if name in ("mixtral", "qwen3 moe") else "fast")
    assert not caplog.records
