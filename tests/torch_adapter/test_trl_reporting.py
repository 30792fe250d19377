"""What PCRTrainer logs arrives where `report_to` sends it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import trl.extras.profiling
from trl_runs import train

from pcr_torch.trl import PCRConfig, PCRTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
EXPECTED = {f"train/pcr/{name}" for name in ("conflict_rate", "cosine", "alpha", "boost", "removed", "noise_share")}


@pytest.mark.parametrize("tool", ["wandb", "trackio"])
def test_metrics_arrive_in(tool: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for the tool's module, which takes any call: the real ones want a server or an account."""
    fake = MagicMock()
    fake.__spec__ = ModuleSpec(tool, None)
    fake.context_vars.current_space_id.get.return_value = None
    for name in ("", ".sdk", ".sdk.lib", ".sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, tool + name, fake)
    fake.ConfigError = ValueError
    monkeypatch.setattr(trl.extras.profiling, tool, fake, raising=False)  # which imports it where it is installed
    train(PCRTrainer, PCRConfig, folder, tmp_path, report_to=tool, noise_every=1, reference_noise=0.3, log_layers=True)
    logged = [call.args[0] for call in fake.log.call_args_list]
    steps = [row for row in logged if "train/pcr/alpha" in row]
    assert [row["train/global_step"] for row in steps] == [1, 2]
    for row in steps:
        assert {*EXPECTED, "train/pcr/layer_01/cosine"} <= row.keys()
        assert isinstance(row["train/pcr/conflict_rate"], float)


def test_metrics_arrive_in_tensorboard(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX", reason="needs the extra pcr-grpo[tensorboard]")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "train"))
    from events import curves

    options: dict[str, Any] = {"report_to": "tensorboard", "noise_every": 1, "reference_noise": 0.3}
    trainer, _ = train(PCRTrainer, PCRConfig, folder, tmp_path, **options)
    read = curves(tmp_path)
    assert read.keys() >= EXPECTED
    history = [row["pcr/removed"] for row in trainer.state.log_history if "pcr/removed" in row]
    assert read["train/pcr/removed"] == [(1, pytest.approx(history[0])), (2, pytest.approx(history[1]))]
