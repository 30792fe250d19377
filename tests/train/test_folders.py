"""One run a folder at a time, and checkpoints that are damaged or were never finished."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from pcr_torch.train.engine import TorchEngine
from pcr_train import checksums
from pcr_train.folder import alone_in, told_when_full, whole_checkpoint

_HOLD = """
import sys, time
from pathlib import Path
from pcr_train.folder import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_runs_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=rf"--out: another run is going on in .*run \(process {other.pid}\)"),
            alone_in(folder),
        ):
            pass
        dying = threading.Timer(0.5, os.kill, (other.pid, signal.SIGKILL))  # as a run that is just being killed
        dying.start()
        with alone_in(folder):
            assert not dying.is_alive()
        other.wait()


@pytest.mark.parametrize("option", ["--out", "--resume"])
def test_a_folder_that_cannot_be_written_is_named(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=rf"{option}: .*file/run cannot be written: Not a directory"),
        alone_in(tmp_path / "file" / "run", option),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1 << 40),  # a quota is not seen in what is free
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), 0),  # torch
        (ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 15: No space left on device"), 0),  # orbax
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_full_disk_is_named(error: Exception, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    for then in ("start the run again", f"go on with --resume {tmp_path}"):
        expected = f"--out: {tmp_path} cannot be written: No space left on device; make room, and {then}"
        with pytest.raises(ValueError, match=re.escape(expected)), told_when_full(tmp_path, "--out"):
            raise error
        (tmp_path / "settings.json").touch()


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    for error in (ValueError("blocks: none"), RuntimeError("shapes"), OSError(errno.ENOENT, "no such file")):
        with pytest.raises(type(error)) as caught, told_when_full(tmp_path, "--out"):
            raise error
        assert caught.value is error


def checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir()
    (made / "trainer_state.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(100)))
    checksums.seal(made)
    return made


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_off(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def resume(folder: Path) -> tuple[Path | None, str]:
    console = Console(record=True, width=500)
    return whole_checkpoint(folder, TorchEngine, console), console.export_text()


@pytest.mark.parametrize("damage", [flip, cut_off, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["model.safetensors", "checksums.json"])
def test_a_damaged_checkpoint_is_kept_and_the_one_before_taken(
    damage: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    damage(second / name)
    missing = damage is Path.unlink and name == "model.safetensors"
    if name == "checksums.json" and damage is Path.unlink:
        cut_off(second / "model.safetensors")  # without them, by the file's own format
        name = "model.safetensors"
    found, text = resume(tmp_path)
    assert found == first
    assert f"{second / name} is {'missing' if missing else 'damaged'};" in text
    kept = tmp_path / "damaged-checkpoint-2"
    assert f"it is kept in {kept}, and the run goes on after checkpoint-1" in text
    assert (kept / "trainer_state.json").exists()
    assert resume(tmp_path) == (first, "")
    checkpoint(tmp_path, 2)
    flip(second / "trainer_state.json")
    assert resume(tmp_path)[0] == first
    assert (tmp_path / "damaged-checkpoint-2_2").exists()


def test_where_no_checkpoint_is_whole_the_run_stops_each_time(tmp_path: Path) -> None:
    flip(checkpoint(tmp_path, 2) / "model.safetensors")
    (checkpoint(tmp_path, 1) / "model.safetensors").unlink()
    for _ in range(2):  # it does not begin anew the second time
        with pytest.raises(
            ValueError,
            match=r"--resume: .*-2/model\.safetensors is damaged, and .*-1/model\.safetensors is missing; no other",
        ):
            resume(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "all but the trainer's state", "half of that"])
def test_a_kill_in_the_first_save_leaves_a_run_that_begins_again(left: str, tmp_path: Path) -> None:
    if left != "nothing":
        made = checkpoint(tmp_path, 3)
        (made / "checksums.json").unlink()
        {"an empty folder": shutil.rmtree, "all but the trainer's state": Path.unlink, "half of that": cut_off}[left](
            made if left == "an empty folder" else made / "trainer_state.json"
        )
        made.mkdir(exist_ok=True)
    found, text = resume(tmp_path)
    assert found is None
    assert "begins at its first step" in text
    assert ("was not written to its end; it is kept in" in text) == (left != "nothing")
    assert not list(tmp_path.glob("checkpoint-*"))


def test_older_checkpoints_are_left_alone(tmp_path: Path) -> None:
    """One that the trainer was just deleting when it was killed."""
    (checkpoint(tmp_path, 1) / "model.safetensors").unlink()
    second = checkpoint(tmp_path, 2)
    assert resume(tmp_path) == (second, "")
    assert (tmp_path / "checkpoint-1").exists()
