from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pcr_train.settings import Settings, make_settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "no stability gradient"),
        ({"beta": float("nan")}, "--beta"),
        ({"rule": "magic"}, "expected one of pcr, paper"),
        ({"generations": 1}, "at least 2"),
        ({"steps": 0}, "--steps"),
        ({"shots": -1}, "--shots"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": float("inf")}, "--learning-rate"),
        ({"temperature": 1e-30}, "--temperature"),
        ({"max_boost": -1.0}, "max_boost"),
        ({"prompts": 4, "micro_prompts": 3}, "does not divide"),
        ({"baseline": 0.0}, "--baseline: expected a share"),
        ({"baseline": 0.5, "noise_every": 0}, "--noise-every 0: --baseline"),
        ({"kl": "k2"}, "--kl: expected one of k3, k3_ratio"),
        ({"precision": "float16"}, "expected one of float32, bfloat16"),
    ],
)
def test_bad_settings_name_the_option(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_presets_give_way_to_what_is_given():
    assert make_settings("tiny").shots == 0
    assert make_settings("tiny", shots=3).shots == 3
    assert make_settings("some/model").shots == Settings().shots


def test_saved_settings_come_back(tmp_path: Path):
    settings = make_settings("tiny", task_options={"max_terms": 3}, alpha=0.5)
    settings.save(tmp_path / "settings.json")
    assert Settings.load(tmp_path / "settings.json") == settings


def test_foreign_settings_file(tmp_path: Path):
    (tmp_path / "settings.json").write_text('{"colour": "red"}')
    with pytest.raises(ValueError, match="not a settings file of this version"):
        Settings.load(tmp_path / "settings.json")


def test_differences_leave_out_what_may_change():
    settings = Settings()
    assert settings.differences(replace(settings, steps=99, save_every=1)) == []
    assert settings.differences(replace(settings, beta=0.5, seed=2)) == ["beta", "seed"]


def test_a_rule_whose_module_does_not_exist_is_named_with_its_option() -> None:
    with pytest.raises(ValueError, match=r"--rule: no_such_module cannot be imported: No module named"):
        Settings(rule="no_such_module:Rule")


def test_ways_to_measure_noise() -> None:
    assert Settings(norms="loop").norms == "loop"
    with pytest.raises(ValueError, match="--norms: expected one of auto, fast, loop"):
        Settings(norms="ghost")
