"""Tiny models gain nothing from several threads, and lose much where cores are shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk, where TRL finds its reference model."""
    from test_trl import save_model

    return save_model(tmp_path_factory.mktemp("model"))
