from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pcr_torch.train import models
from pcr_torch.train.answers import measuring, respond
from pcr_train.progress import read_metrics
from pcr_train.run import Outcome

Go = Callable[..., Outcome]


def rows_without_time(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(go: Go, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Five steps without a break."""
    return go(tmp_path_factory.mktemp("whole") / "run", steps=5, retention_task="products")


def test_run_leaves_metrics_plot_and_measurements(whole: Outcome):
    rows = read_metrics(whole.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert {"reward", "kl", "loss", "grad_norm", "pcr/conflict_rate", "pcr/alpha", "seconds"} <= row.keys()
        blocks = row["blocks"]
        assert len(blocks["name"]) == 12  # 4 layers of gate, up and down
        assert {len(column) for column in blocks.values()} == {12}
        assert set(blocks["family"]) == {"gate_proj", "up_proj", "down_proj"}
        assert sorted(set(blocks["layer"])) == [0, 1, 2, 3]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["kl"] > 1e-6
    assert whole.plot.read_bytes().startswith(b"\x89PNG")
    for name, saved in (("before", whole.before), ("after", whole.after)):
        values = json.loads((whole.folder / f"{name}.json").read_text())
        assert values["reward"] == saved.reward
    assert all(0 <= r <= 1 for r in whole.before.reward)
    assert whole.before.text != whole.after.text


def test_retention_set_is_what_the_model_solved_before(whole: Outcome):
    assert all(whole.before.retention)
    assert len(whole.after.retention) == len(whole.before.retention)


@pytest.mark.parametrize("at", [2, 4])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(go: Go, whole: Outcome, tmp_path: Path, at: int):
    torch.manual_seed(1234 + at)  # what happened in this process before must not matter
    go(tmp_path / "run", steps=at, retention_task="products")
    torch.manual_seed(99)
    resumed = go(tmp_path / "run", steps=5, retention_task="products", resume=True)
    assert rows_without_time(resumed.folder) == rows_without_time(whole.folder)
    mine, theirs = (load_file(o.folder / "checkpoint-5" / "model.safetensors") for o in (resumed, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert resumed.after == whole.after


def test_micro_batches_and_temporal_prior_resume_bit_for_bit(go: Go, tmp_path: Path):
    options = {"micro_prompts": 2, "prior": "temporal"}
    straight = go(tmp_path / "a", steps=3, **options)
    go(tmp_path / "b", steps=1, **options)
    broken = go(tmp_path / "b", steps=3, resume=True, **options)
    assert rows_without_time(broken.folder) == rows_without_time(straight.folder)


def test_resume_with_other_settings_is_refused(go: Go, whole: Outcome):
    with pytest.raises(ValueError, match="--rule, --beta differs"):
        go(whole.folder, steps=6, retention_task="products", beta=0.5, rule="grpo", resume=True)
    with pytest.raises(ValueError, match="less than the 5 steps already taken"):
        go(whole.folder, steps=4, retention_task="products", resume=True)


def test_folder_in_use_is_refused(go: Go, whole: Outcome):
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        go(whole.folder)


def test_resume_without_a_run(go: Go, tmp_path: Path):
    with pytest.raises(ValueError, match="no run of pcr-train was started there"):
        go(tmp_path, resume=True)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(go: Go, whole: Outcome, tmp_path: Path):
    for name in ("settings.json", "before.json"):
        (tmp_path / name).write_text((whole.folder / name).read_text())
    again = go(tmp_path, steps=5, retention_task="products", resume=True)
    assert rows_without_time(again.folder) == rows_without_time(whole.folder)


def test_rules_differ_from_plain_grpo(go: Go, tmp_path: Path):
    options = {"steps": 2, "learning_rate": 3e-3, "beta": 1.0}
    pcr, grpo = (go(tmp_path / rule, rule=rule, **options) for rule in ("hard", "grpo"))
    last = [read_metrics(o.metrics)[-1]["blocks"]["b"] for o in (pcr, grpo)]
    assert set(last[1]) == {1.0}
    assert last[0] != last[1] or not any(read_metrics(pcr.metrics)[-1]["blocks"]["conflict"])


def test_a_models_own_sampling_defaults_stay_out_of_the_run(tiny_folder: Path, tmp_path: Path):
    """Training samples without them, and so must measuring; and the likelihood knows nothing of them."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    file = folder / "generation_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"do_sample": True, "top_p": 0.1, "repetition_penalty": 2.0}))
    prompts = ["2 + 2 =", "3 + 5 ="] * 20
    answers = []
    for where in (tiny_folder, folder):
        model, tokenizer = models.load(str(where), "\n")
        with measuring(model, 0):
            answers.append(respond(model, tokenizer, prompts, max_tokens=4, temperature=1.0))
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 2


def test_damaged_files_are_named(go: Go, whole: Outcome, tmp_path: Path):
    for name, text, message in (
        ("before.json", "{", "before.json is damaged"),
        ("metrics.jsonl", "{\n{}\n", "metrics.jsonl, line 1, is damaged"),
    ):
        out = tmp_path / name
        shutil.copytree(whole.folder, out)
        (out / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            go(out, steps=6, retention_task="products", resume=True)
