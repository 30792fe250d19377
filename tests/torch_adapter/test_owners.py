"""Rows of activations are given to the response that the autograd graph shows, not to the one whose place fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import batch, tiny_model
from test_pullback import assert_gradients_close, assert_statistics_close, resolved
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import pcr_core
from pcr_torch import PCR
from pcr_torch.graph.owner_arrays import NOBODY
from pcr_torch.graph.owners import survey

PICTURE = 30


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=31, **small),
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=16, **small),
        image_token_id=PICTURE,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("pictures", [(1, 1, 1, 1), (2, 2, 0, 0), (0, 1, 2, 1)])
def test_pictures_belong_to_the_responses_that_see_them(pictures: tuple[int, ...]) -> None:
    """As many pictures as responses, four tokens each, but not one each."""
    model = llava()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(PICTURE, (4, 12), generator=generator)
    for row, count in enumerate(pictures):
        tokens[row, : 4 * count] = PICTURE
    pixels = torch.randn(4, 3, 8, 8, generator=generator)
    cotangents = torch.randn(2, 4, 3, generator=generator).unbind()

    def logp() -> Tensor:
        logits = model(input_ids=tokens, pixel_values=pixels).logits[:, -4:-1]
        return logits.log_softmax(-1).gather(-1, tokens[:, -3:, None]).squeeze(-1)

    assert_auto_equals_loop(model, logp, cotangents, torch.tensor([0, 0, 1, 1]), r"mlp.*weight", fast=True)


class TwoLayers(nn.Module):
    """What most of the models below have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 8)
        self.lower, self.upper = nn.Linear(8, 8), nn.Linear(8, 31)


class TimeMajor(TwoLayers):
    """As many tokens as responses; layers see (tokens, responses, features)."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.lower(self.embed(tokens).transpose(0, 1))).cumsum(0)
        return self.upper(hidden).transpose(0, 1)


class AsManyExperts(TwoLayers):
    """As many experts as responses, each sees one token of all of them; one matrix serves all."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        by_expert = self.lower(hidden.permute(1, 0, 2) * torch.arange(1.0, 1 + hidden.shape[1])[:, None, None])
        return self.upper(torch.tanh(by_expert.permute(1, 0, 2)) + hidden)


class Chunked(TwoLayers):
    """Windows of tokens in place of responses, (responses * windows, tokens, features)."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        windows = self.lower(hidden.reshape(-1, 2, 8)).cumsum(1)
        return self.upper(windows.view_as(hidden))


class Flat(TwoLayers):
    """(responses * tokens, features), as OPT has them."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return self.upper(torch.relu(self.lower(hidden.reshape(-1, 8)))).view(*tokens.shape, 31)


class Copies(nn.Module):
    """Several versions of the residual stream, (versions, responses, tokens, features), as AltUp has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 8)
        self.lower, self.middle, self.upper = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 31)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        versions = self.lower(torch.stack([hidden, torch.tanh(hidden), hidden.cumsum(1)]))
        versions = torch.stack([self.middle(versions[0]), versions[2]])
        return self.upper(versions.mean(dim=0) + versions.sum(dim=(0,), keepdim=True)[0])


class Assigned(nn.Module):
    """Parts of tensors are written to, one as (tokens, responses), one added to, one by a view that repeats rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 8)
        self.lower, self.middle, self.upper = nn.Linear(8, 8), nn.Linear(4, 4), nn.Linear(8, 31)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        whole = torch.zeros(3, *hidden.shape)
        whole[0].transpose(0, 1)[1:].copy_(self.lower(hidden.transpose(0, 1))[1:])
        whole[..., :4] = self.middle(hidden[..., 4:])
        whole[1:] += torch.tanh(whole[0])
        return self.upper(whole.sum(0))


class ChangedInPlace(TwoLayers):
    """More than an assignment: a part is scaled."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.lower(self.embed(tokens))
        hidden[:, 1:] *= 2
        return self.upper(torch.tanh(hidden))


class AveragedInPlace(TwoLayers):
    """An assignment only in form: rows become means of their neighbours, and belong to nobody alone."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.lower(self.embed(tokens))
        mixed = torch.zeros(1, 6, 48)
        mean = 0.5 * (torch.eye(6).roll(1, 0) + torch.eye(6).roll(-1, 0))
        mean[0] = mean[5] = torch.eye(6)[0]
        mixed[0].addmm_(mean.T, hidden.flatten(1))
        return self.upper(torch.tanh(mixed[0].view_as(hidden)))


class AllInAllExperts(TwoLayers):
    """(experts, responses * tokens, features) by a batch of matrices, as Llama 4 has them; complex rotations."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(6, 8, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.lower(self.embed(tokens))
        turned = torch.view_as_complex(hidden.unflatten(-1, (4, 2)).contiguous()) * torch.exp(torch.arange(4) * 1j)
        rows = torch.view_as_real(turned).reshape(-1, 8).repeat(6, 1)
        return self.upper(torch.bmm(rows.view(6, -1, 8), self.experts).sum(0).view_as(hidden))


class Mixed(TwoLayers):
    """Responses see one another: no row below belongs to one of them."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.lower(self.embed(tokens))
        return self.upper(hidden - hidden.mean(0, keepdim=True))


class SeveralReasons(nn.Module):
    """A layer whose rows are mixed, one that is plain, weights that are in no layer: each is measured in its way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 8)
        self.lower, self.middle = nn.Linear(8, 8), nn.Linear(8, 8)
        self.upper = nn.ParameterList([torch.randn(8, 31)])

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.lower(self.embed(tokens))
        return torch.tanh(self.middle(hidden - hidden.mean(0, keepdim=True))) @ self.upper[0]


@pytest.mark.parametrize(
    ("kind", "fast"),
    [
        (TimeMajor, True),
        (AsManyExperts, True),
        (Chunked, True),
        (Flat, True),
        (Copies, True),
        (Assigned, True),
        (ChangedInPlace, True),
        (AveragedInPlace, False),
        (AllInAllExperts, True),
        (Mixed, False),
        (SeveralReasons, False),
    ],
)
def test_other_orders_of_rows(kind: type[nn.Module], fast: bool) -> None:
    torch.manual_seed(0)
    model, data = kind(), batch(n=6, prompt=3, length=3)
    assert data.tokens.shape == (6, 6)

    def logp() -> Tensor:
        logits = model(data.tokens)[:, data.prompt - 1 : -1]
        return logits.log_softmax(-1).gather(-1, data.tokens[:, data.prompt :, None]).squeeze(-1)

    cotangents = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(2)).unbind()
    assert_auto_equals_loop(model, logp, cotangents, data.group_ids, "lower|middle|upper", fast=fast)


def assert_auto_equals_loop(
    model: nn.Module,
    logp: Callable[[], Tensor],
    cotangents: tuple[Tensor, ...],
    ids: Tensor,
    blocks: str,
    *,
    fast: bool,
) -> None:
    rule = pcr_core.PCR.paper()
    method = PCR(model, blocks=blocks, rule=rule)
    method.accumulate_cotangents(logp(), *cotangents, group_ids=ids)
    report, ways = method.resolve(), method.path
    method.remove()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    statistics, expected = resolved(model, logp, cotangents, ids, blocks=blocks, rule=rule, norms="loop")
    for grads in (got, expected):
        for name in [name for name in grads if name.endswith("k_proj.bias")]:
            assert grads.pop(name).norm() < 1e-6  # a softmax does not see what is the same for all keys
    assert_statistics_close(report.statistics, statistics, 1e-5)
    assert_gradients_close(got, expected, 1e-4)
    assert all(way == "fast" for way in ways.values()) == fast, ways


def test_a_head_that_reads_some_tokens_only() -> None:
    """As TRL scores completions: rows picked by a mask; attention below mixes them with the rest of their response."""
    model: Any = tiny_model("llama")
    data = batch()
    chosen = torch.zeros_like(data.tokens, dtype=torch.bool)
    chosen[:, data.prompt - 1 : -1] = data.mask

    def logp() -> Tensor:
        hidden = model.model(input_ids=data.tokens).last_hidden_state
        picked = model.lm_head(hidden[chosen]).log_softmax(-1)
        taken = picked.gather(-1, data.tokens[:, data.prompt :][data.mask][:, None])[:, 0]
        return torch.zeros(data.mask.shape).masked_scatter(data.mask, taken)

    cotangents = torch.randn(2, *data.mask.shape, generator=torch.Generator().manual_seed(1)).unbind()
    assert_auto_equals_loop(model, logp, cotangents, data.group_ids, "mlp", fast=True)


def test_rows_that_nothing_depends_on_belong_to_nobody() -> None:
    layer = nn.Linear(3, 2)
    method = PCR(nn.Sequential(layer), noise_every=1, blocks="weight")
    hidden = layer(torch.randn(5, 4, 3))
    logp = hidden[torch.tensor([3, 0])].sum(-1)
    (owners,) = survey(logp).calls["0"]
    assert not isinstance(owners, str)
    assert owners.tolist() == [1, NOBODY, NOBODY, 0, NOBODY]
    method.remove()


def test_the_log_says_once_which_parameters_take_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    model, data = tiny_model("qwen2"), batch()
    method = PCR(model, noise_every=1, blocks="embed_tokens|up_proj")
    for _ in range(2):
        logp = data.logp(model)
        method.accumulate(logp, data.objective(logp), group_ids=data.group_ids)
        method.resolve()
    (message,) = (record.getMessage() for record in caplog.records)
    assert "1 of 3 block parameters" in message
    assert "model.embed_tokens.weight: it is tied" in message
