"""The problem's language model as one of transformers, on disk and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.utils.logging import disable_progress_bar

from pcr_conformance.trainers.problem import TrainerProblem

disable_progress_bar()  # of reading and writing a hundred weights


class TinyConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes; one more word than the model can say pads."""

    model_type = "pcr_tiny"

    def __init__(self, words: int = 1, features: int = 1, hidden: int = 1, **options: Any) -> None:
        self.words, self.features, self.hidden = words, features, hidden
        self.auto_map: dict[str, str] = {}  # TRL asks for it
        super().__init__(**options | {"tie_word_embeddings": False, "pad_token_id": words, "eos_token_id": words})


class _Backbone(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.words + 1, config.features)
        self.up = nn.Linear(config.features, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.features, bias=False)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        embedded = self.embed(input_ids)
        count = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)[:, None]
        x = embedded + embedded.cumsum(dim=1) / count
        return BaseModelOutput(last_hidden_state=x + self.down(torch.tanh(self.up(x))))


class TinyForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Prompts are of one length, so the attention mask, which ends responses, needs no attention."""

    config_class = TinyConfig
    base_model_prefix = "model"

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.model = _Backbone(config)
        self.head = nn.Linear(config.features, config.words, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return CausalLMOutput(logits=self.head(self.model(input_ids).last_hidden_state))


AutoConfig.register("pcr_tiny", TinyConfig)
AutoModelForCausalLM.register(TinyConfig, TinyForCausalLM)


def saved(problem: TrainerProblem, folder: Path) -> None:
    """The model in `folder/model`, where a trainer finds it and its reference."""
    weights = {name: torch.tensor(weight, dtype=torch.float32) for name, weight in problem.weights.items()}
    words, features = weights["embed"].shape
    model = TinyForCausalLM(TinyConfig(words, features, weights["up"].shape[1]))
    with torch.no_grad():
        model.model.embed.weight.zero_()  # what pads as well: a run is resumed from the same model
        model.model.embed.weight[:words].copy_(weights["embed"])
        for name, module in (("up", model.model.up), ("down", model.model.down), ("head", model.head)):
            module.weight.copy_(weights[name].T)
    model.save_pretrained(folder / "model")


def as_numpy(model: TinyForCausalLM) -> dict[str, Any]:
    """By the problem's names and in its shapes."""
    matrices = {"up": model.model.up, "down": model.model.down, "head": model.head}
    found = {name: module.weight.detach().T.numpy().copy() for name, module in matrices.items()}
    return found | {"embed": model.model.embed.weight.detach()[:-1].numpy().copy()}
