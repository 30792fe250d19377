"""The options of PCRConfig: what text and files of settings may hold, and what is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser
from trl import TrlParser

import pcr_core
import pcr_torch
import pcr_torch.trl
from pcr_torch.trl.config import PCRConfig

pytestmark = pytest.mark.filterwarnings("ignore")
FIXED = {"output_dir": "unused", "report_to": "none", "bf16": False, "use_cpu": True}


def config(**options: Any) -> PCRConfig:
    return PCRConfig(**FIXED, **({"beta": 0.1} | options))


def by_dict(options: dict[str, Any], _: Path) -> PCRConfig:
    made: PCRConfig = HfArgumentParser(PCRConfig).parse_dict({**FIXED, **options})[0]
    return made


def by_command_line(options: dict[str, Any], _: Path) -> PCRConfig:
    fixed = {**FIXED, "bf16": "false"}
    words = [word for name, value in {**fixed, **options}.items() for word in (f"--{name}", str(value))]
    made: PCRConfig = TrlParser(PCRConfig).parse_args_and_config(words)[0]
    return made


def by_file(options: dict[str, Any], folder: Path) -> PCRConfig:
    file = folder / "settings.yaml"
    file.write_text("\n".join(f"{name}: {value}" for name, value in {**FIXED, **options}.items()))
    made: PCRConfig = TrlParser(PCRConfig).parse_args_and_config(["--config", str(file)])[0]
    return made


@pytest.mark.parametrize("way", [by_dict, by_command_line, by_file])
@pytest.mark.parametrize("truth", ["false", "true", "False", "True"])
def test_text_of_files_and_command_lines_is_read(way: Callable[..., PCRConfig], truth: str, tmp_path: Path) -> None:
    options = {
        "beta": "0.04",
        "noise_every": "5",
        "rule": "pcr",
        "alpha": "0.25",
        "max_boost": "3",
        "every": "2",
        "log_layers": truth,
    }
    assert way(options, tmp_path).noise_every == 5
    options |= {"noise_every": "1", "prior": "temporal", "discount": "0.5"}
    made = way(options, tmp_path)
    assert (made.beta, made.max_boost, made.every, made.discount) == (0.04, 3.0, 2, 0.5)
    assert made.log_layers is (truth.lower() == "true")
    assert made.make_rule() == pcr_core.PCR(alpha=0.25, max_boost=3.0, prior=pcr_core.TemporalPrior(0.5))


def test_numbers_of_numpy_and_whole_floats_are_numbers() -> None:
    made = config(beta=np.float64(0.5), every=2.0, max_boost=np.int64(4), alpha=0.5, granularity="global", blocks="all")
    assert (made.beta, made.every, made.max_boost) == (0.5, 2, 4.0)
    assert {type(made.beta), type(made.every), type(made.max_boost)} == {float, int}


class Function:
    def __call__(self, name: str, parameter: Any) -> bool:
        return True


WRONG: dict[str, list[Any]] = {
    "beta": [True, None, "much", "", math.nan, "nan", [0.1], torch.tensor(0.1)],
    "rule": [pcr_core.PCR, pcr_core.PCR(), None, True, 1, "", "PCR", ["pcr"]],
    "alpha": [True, "true", "", "nan", math.nan, -0.1, [0.5], pcr_core.PCR],
    "max_boost": [True, "many", "", math.nan, "-1", [3]],
    "prior": [None, True, "none", pcr_core.FlatPrior(), pcr_core.FlatPrior, ["flat"]],
    "update": [True, "", "Anchored", ["literal"]],
    "gate": [True, "", 0],
    "conflict": [True, "", 0],
    "blocks": [None, True, 1, lambda name, parameter: True, Function(), ["mlp"], "", "(", "*"],
    "granularity": [None, True, "", "row"],
    "strata": [None, True, "", "prompt"],
    "norms": [None, True, "", "slow"],
    "every": [True, False, None, 0, -1, 1.5, "1.5", "", math.nan, math.inf, [2]],
    "noise_every": [True, False, -1, 1.5, "1.5", "", "never", math.nan, math.inf, [2]],
    "baseline": [True, "", "much", 0, 1.5, -0.1, math.nan, [0.9]],
    "baseline_memory": [None, True, "", "much", 1, -0.1, math.nan, [0.9]],
    "log_layers": [None, "", "maybe", 2, 1, 0.0, [True]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_is_no_option_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: .*"):
        config(**{name: value})
    late = config()
    setattr(late, name, value)
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: .*"):
        pcr_torch.trl.PCRTrainer(model="not looked at", reward_funcs=len, args=late)


@pytest.mark.parametrize("value", [True, "half", 0.0, 2.0])
def test_a_discount_is_a_number_in_its_bounds(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^discount: "):
        config(prior="temporal", discount=value)


def test_every_option_is_tried() -> None:
    own = set(vars(PCRConfig)["__annotations__"])
    assert own | {"beta"} == {*WRONG, "discount"}


def test_a_config_is_found_where_the_trainer_is() -> None:
    assert pcr_torch.trl.PCRConfig is PCRConfig
    assert "PCRConfig" in pcr_torch.trl.__all__
