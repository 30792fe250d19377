"""A run that is killed, and what it left half written, resumes as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pcr_torch.train.engine import TorchEngine
from pcr_train.progress import read_metrics
from pcr_train.run import Outcome, last_checkpoint

Go = Callable[..., Outcome]
# a prior that remembers: without PCR's own state in the checkpoint the resumed steps would differ
OPTIONS = {"prior": "temporal", "alpha": "snr", "save_every": 2, "heldout": 4}


@pytest.fixture(scope="module")
def whole(go: Go, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return go(tmp_path_factory.mktemp("whole") / "run", steps=6, **OPTIONS)


def assert_same_run(one: Outcome, other: Outcome) -> None:
    rows, expected = (read_metrics(outcome.metrics) for outcome in (one, other))
    for row in (*rows, *expected):
        row.pop("seconds")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows == expected
    mine, theirs = (load_file(outcome.model / "model.safetensors") for outcome in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert one.after == other.after


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_killed_between_checkpoints_and_resumed_equals_uninterrupted_bit_for_bit(
    go: Go, whole: Outcome, tiny_folder: Path, tmp_path: Path
):
    out = tmp_path / "run"
    words = ["--model", str(tiny_folder), "--shots", "0", "--prompts", "4", "--generations", "4", "--max-tokens", "5",
             "--heldout", "4", "--samples", "1", "--retention-task", "none", "--lr", "1e-3", "--threads", "1",
             "--prior", "temporal", "--alpha", "snr", "--save-every", "2", "--steps", "400",
             "--out", str(out)]  # fmt: skip
    command = [sys.executable, "-m", "pcr_train.command", *words]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, (tmp_path / "output").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    left = last_checkpoint(out, TorchEngine)
    assert left is not None
    assert 2 <= int(left.name.rpartition("-")[2]) < 6, "killed too late: nothing would be resumed"
    assert_same_run(go(out, steps=6, resume=True, **OPTIONS), whole)


@pytest.mark.parametrize("written", ["optimizer cut off", "trainer's state cut off"])
def test_a_checkpoint_cut_off_in_writing_is_passed_over(go: Go, whole: Outcome, tmp_path: Path, written: str):
    """The folder as a kill leaves it, by how far the trainer had come; the one before it is complete."""
    out = tmp_path / "run"
    shutil.copytree(half(go, tmp_path.parent), out)
    order = ["pcr_state.pt", "model.safetensors", "optimizer.pt", "trainer_state.json"]
    last = {"optimizer": 2, "trainer's": 3}[written.split()[0]]
    newer = out / "checkpoint-4"
    newer.mkdir()
    for name in order[: last + 1]:
        shutil.copy(out / "checkpoint-2" / name, newer / name)
    size = (newer / order[last]).stat().st_size
    os.truncate(newer / order[last], size // 2)
    found = last_checkpoint(out, TorchEngine)
    assert found is not None
    assert found.name == "checkpoint-2"
    assert_same_run(go(out, steps=6, resume=True, **OPTIONS), whole)
    assert (out / "unfinished-checkpoint-4").exists()
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"])
def test_a_flipped_bit_has_the_run_go_on_from_the_checkpoint_before(
    go: Go, whole: Outcome, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole.folder, out)
    file = out / "checkpoint-6" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert_same_run(go(out, steps=6, resume=True, **OPTIONS), whole)
    assert (out / "damaged-checkpoint-6" / name).read_bytes() == data
    (out / "checkpoint-6" / name).unlink()
    shutil.rmtree(out / "checkpoint-4")
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"checkpoint-6/{name} is missing; no other checkpoint .* is whole"):
            go(out, steps=6, resume=True, **OPTIONS)


def test_killed_in_its_first_save_the_run_begins_again(
    go: Go, whole: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pcr_torch.trl import PCRTrainer

    class Killed(BaseException):
        pass

    def kill(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(PCRTrainer, "_save_optimizer_and_scheduler", kill)
        with pytest.raises(Killed):
            go(tmp_path / "run", steps=6, **OPTIONS)
    assert_same_run(go(tmp_path / "run", steps=6, resume=True, **OPTIONS), whole)
    assert (tmp_path / "run" / "unfinished-checkpoint-2").exists()


def half(go: Go, folder: Path) -> Path:
    """A run of two steps with its checkpoint, made once."""
    if not (folder / "half" / "after.json").exists():
        go(folder / "half", steps=2, **OPTIONS)
    return folder / "half"


def test_at_every_moment_of_saving_there_is_a_complete_checkpoint(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The older one is deleted last, when the newer one has all that resuming needs."""
    import transformers.trainer

    from pcr_torch.trl import PCRTrainer

    out = tmp_path / "run"
    seen: list[tuple[str, str]] = []

    def watch(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> object:
            result = real(*args, **kwargs)
            found = last_checkpoint(out, TorchEngine)
            if found is not None:
                assert (found / "pcr_state.pt").exists(), name
                seen.append((name, found.name))
            return result

        monkeypatch.setattr(owner, name, call)

    watch(PCRTrainer, "save_model")
    watch(PCRTrainer, "_save_optimizer_and_scheduler")
    watch(transformers.trainer, "rotate_checkpoints")
    go(out, steps=2, **{**OPTIONS, "save_every": 1})
    assert seen == [
        ("rotate_checkpoints", "checkpoint-1"),
        ("save_model", "checkpoint-1"),
        ("_save_optimizer_and_scheduler", "checkpoint-1"),
        ("rotate_checkpoints", "checkpoint-2"),
    ]
