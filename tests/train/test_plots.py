from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pcr_train.plots import draw, layer_cosines


def row(step: int) -> dict:
    blocks = {
        "layer": [0, 0, 1, None],
        "family": ["up_proj", "down_proj", "up_proj", "lm_head"],
        "cosine": [0.2, -0.4, None, 0.1],
        "cosine_debiased": [0.3, -0.1, None, 0.0],
        "alpha": [0.5, 0.6, None, 0.7],
        "b": [1.0, 1.5, None, 1.0],
    }
    return {
        "step": step,
        "reward": 0.1 * step,
        "kl": None,
        "grad_norm": 1.0,
        "pcr/stability_norm": 0.0,
        "pcr/noise_share": 0.4,
        "blocks": blocks,
    }


@pytest.mark.parametrize("rows", [[row(1)], [row(1), row(2), row(3)], [{"step": 1, "reward": 0.5}]])
def test_plot_is_drawn_without_a_display(rows: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    path = draw(rows, tmp_path / "plot.png", title="a run")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_layer_cosines_average_the_blocks_of_a_layer():
    names, grid = layer_cosines([row(1), row(2)])
    assert names == ["0", "1", "other"]
    np.testing.assert_allclose(grid, [[-0.1, -0.1], [np.nan, np.nan], [0.1, 0.1]])
    np.testing.assert_allclose(layer_cosines([row(1)], "cosine_debiased")[1], [[0.1], [np.nan], [0.0]])


@pytest.mark.parametrize(
    ("stacks", "expected"),
    [
        (["layers"] * 4, ["0", "1", "other"]),
        (
            ["encoder.layers", "decoder.layers", "decoder.layers", None],
            ["encoder 0", "decoder 0", "decoder 1", "other"],
        ),
        (
            ["model.visual.blocks", "model.layers", "model.layers", None],
            ["visual.blocks 0", "layers 0", "layers 1", "other"],
        ),
    ],
)
def test_layers_of_several_stacks_do_not_share_a_row(stacks: list, expected: list, tmp_path: Path):
    several = row(1)
    several["blocks"]["stack"] = stacks
    names, grid = layer_cosines([several])
    assert names == expected
    means = [-0.1] if len(names) == 3 else [0.2, -0.4]
    np.testing.assert_allclose(grid[:, 0], [*means, np.nan, 0.1])
    assert draw([several], tmp_path / "plot.png", title="a run").stat().st_size > 10_000


def test_no_steps_no_plot(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing to plot"):
        draw([], tmp_path / "plot.png", title="")
