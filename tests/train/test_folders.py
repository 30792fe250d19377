"""One run a folder at a time, and checkpoints that were damaged after they were written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pcr_torch.train.engine import TorchEngine
from pcr_train.run import _alone_in, _set_aside_damaged, last_checkpoint

_HOLD = """
import sys, time
from pathlib import Path
from pcr_train.run import _alone_in
with _alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_runs_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=rf"another run is going on in this folder \(process {other.pid}\)"),
            _alone_in(folder),
        ):
            pass
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        with _alone_in(folder):
            pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"--out: .*file/run cannot be written: Not a directory"),
        _alone_in(tmp_path / "file" / "run"),
    ):
        pass


def test_a_damaged_checkpoint_is_kept_and_the_one_before_taken(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"PK\x03\x04 cut off")
    console = Console(record=True, width=500, quiet=False)
    _set_aside_damaged(tmp_path, TorchEngine, console)
    assert "optimizer.pt is damaged" in (text := console.export_text())
    assert "goes on after checkpoint-1" in text
    assert (tmp_path / "damaged-checkpoint-2" / "optimizer.pt").exists()
    assert last_checkpoint(tmp_path, TorchEngine) == tmp_path / "checkpoint-1"
