"""Tiny models gain nothing from several threads, and lose much where cores are shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk, where TRL finds its reference model."""
    from trl_runs import save_model

    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def same_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither TRL nor PCRTrainer shuffles, so that both take the same micro-batches."""
    import trl.trainer.grpo_trainer as stock

    monkeypatch.setattr(stock, "shuffle_sequence_dict", lambda batch: batch)
    monkeypatch.setattr("pcr_torch.trl.whole_groups.shuffle_groups", lambda batch, ids: batch)
