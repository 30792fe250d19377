"""The language models of transformers, on no device: a few layers each, no memory for their weights."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

_LAYERS = re.compile(r"^(n_layers?|depth|(num_|encoder_|decoder_)+(\w+_)?(layers|depth))$")
_EXPERTS = re.compile(r"^(num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_routed_experts)$")
_MISSING: dict[str, Any] = {  # what defaults leave out
    "n_routed_experts": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rope_theta": 1e4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
_KINDS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ")


def names() -> list[str]:
    """Of all classes in the mappings from configurations to language models."""
    found: dict[str, None] = {}
    for kind in _KINDS:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {})
        for classes in mapping.values():
            found |= dict.fromkeys(classes if isinstance(classes, tuple | list) else [classes])
    return [*found]


def on_no_device(name: str) -> nn.Module:
    """A model of up to six layers in each stack and eight experts in each.

    Raises:
        Exception: its default configuration does not suit it.
    """
    of_name = getattr(transformers, name)
    failed: Exception | None = None
    for prepare in (_shrunk, _completed, lambda config: config):
        try:
            with torch.device("meta"):
                return of_name(prepare(of_name.config_class()))  # type: ignore[no-any-return]
        except Exception as error:  # sizes that do not fit each other, parts of other libraries
            failed = failed or error
    raise failed  # type: ignore[misc]


def _shrunk(config: Any) -> Any:
    for key, value in [*vars(config).items()]:
        if isinstance(value, transformers.PretrainedConfig):
            _shrunk(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            most = 6 if _LAYERS.match(key) and "kv_shared" not in key else 8 if _EXPERTS.match(key) else value
            setattr(config, key, min(value, most))
    return config


def _completed(config: Any) -> Any:
    config = _shrunk(config)
    parts = [config, *(part for part in vars(config).values() if isinstance(part, transformers.PretrainedConfig))]
    for part in parts:
        for key, value in _MISSING.items():
            if getattr(part, key, value) is None:
                setattr(part, key, value)
        rope = getattr(part, "rope_parameters", None)
        if isinstance(rope, dict) and rope.get("rope_theta", 0) is None:
            rope["rope_theta"] = 1e4
    return config
