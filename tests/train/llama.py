"""The JAX transformer's parameters in the model of transformers whose architecture it has."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flax import nnx

from pcr_torch.train.tiny import _new_model, character_tokenizer


def as_llama(params: Any) -> Any:
    """torch's tiny model with these parameters."""
    llama = _new_model(character_tokenizer())
    mine = nnx.to_pure_dict(params)
    weights = {f"{name}.weight": mine["embed"] for name in ("model.embed_tokens", "lm_head")}
    weights["model.norm.weight"] = mine["norm"]["scale"]
    for i, layer in mine["layers"].items():
        at = f"model.layers.{i}"
        weights[f"{at}.input_layernorm.weight"] = layer["attn_norm"]["scale"]
        weights[f"{at}.post_attention_layernorm.weight"] = layer["mlp_norm"]["scale"]
        for theirs, part in (("self_attn", "attn"), ("mlp", "mlp")):
            for name, linear in layer[part].items():
                weights[f"{at}.{theirs}.{name}.weight"] = np.asarray(linear["kernel"]).T
    llama.load_state_dict({name: torch.tensor(np.asarray(x)) for name, x in weights.items()})
    return llama.eval()
