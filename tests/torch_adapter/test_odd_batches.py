"""Batches that are padded, packed or in another order: each is right, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BOTH, RULE, assert_right, assert_right_without_noise
from problems import Batch, batch, tiny_model
from torch import Tensor, nn

from pcr_torch import PCR


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
